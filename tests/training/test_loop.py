"""Training: it learns, and resumes bit for bit."""

import pytest
import torch
from kill_and_resume import compare

from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.embeddings import EmbeddingCache
from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.sam.stabilize import stabilize, unstabilize
from stable_sam_cuda.training.loop import PluginTrainer
from stable_sam_cuda.training.methods import ENCODER_METHODS, METHODS, install_method
from stable_sam_cuda.training.options import TrainingOptions
from stable_sam_cuda.training.pictures import CachedPictures, EncodedPictures


def trainer_for(sam, method, picture_folder, tmp_path, **options):
    samples = find_masked_images(picture_folder)
    if method in ENCODER_METHODS:
        source = EncodedPictures(sam, samples)
    else:
        cache = EmbeddingCache(tmp_path / "cache", sam, samples)
        cache.fill()
        source = CachedPictures(sam, cache)
    torch.manual_seed(1)
    parameters = install_method(sam, method)
    return PluginTrainer(sam, parameters, source, tmp_path / "run", TrainingOptions(**options))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_only_the_methods_own_parameters_change(method, small_sam, picture_folder, tmp_path):
    trainer = trainer_for(small_sam, method, picture_folder, tmp_path, epochs=2)
    before = {name: value.detach().clone() for name, value in small_sam.named_parameters()}
    trainer.run()
    changed = {name for name, value in small_sam.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= set(trainer.parameters)
    if method == "stable":
        assert all(".plugin." in name for name in changed)


def test_loss_falls(small_sam, picture_folder, tmp_path):
    trainer = trainer_for(small_sam, "dt", picture_folder, tmp_path, epochs=4)
    losses = []
    trainer.run(lambda record: losses.append(record["loss"]))
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2])


@pytest.mark.slow
def test_killed_and_resumed_runs_of_the_verb_end_with_the_same_bits(tmp_path):
    """Two kills, the second in the writing of a checkpoint; `kill_and_resume.py` itself makes it twenty."""
    assert compare(tmp_path, kills=2)[0]


def test_gradients_do_not_depend_on_the_number_of_pictures_accumulated_at_once(small_sam, picture_folder, tmp_path):
    """The first step's gradient is the mean over pictures, however many objects each has, whoever computed its part."""
    trainer = trainer_for(small_sam, "stable", picture_folder, tmp_path, images=4)
    whole = _first_gradient(trainer)
    parts = [_gradient_of(trainer, picture) for picture in trainer._pictures(0)]
    assert [count for count, _ in parts] == [1.0] * len(parts)
    for name in whole:
        summed = sum(gradients[name] for _, gradients in parts) / len(parts)
        torch.testing.assert_close(whole[name], summed, rtol=1e-4, atol=1e-7)


def _first_gradient(trainer):
    step, trainer.optimizer.step = trainer.optimizer.step, lambda: None
    trainer._train_step(trainer._examples())
    trainer.optimizer.step, trainer.updates = step, 0
    return {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}


def _gradient_of(trainer, picture):
    trainer.optimizer.zero_grad(set_to_none=False)
    (row,) = trainer._accumulate([(picture, trainer.source.example(picture))])
    return row[0], {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}


def test_resuming_with_other_options_is_refused(small_sam, picture_folder, tmp_path):
    trainer = trainer_for(small_sam, "pt", picture_folder, tmp_path)
    trainer.run()
    trainer.options = TrainingOptions(lr=0.5)
    with pytest.raises(ValueError, match="out: expected the options"):
        trainer.resume()


def test_resuming_on_other_pictures_is_refused(small_sam, picture_folder, tmp_path):
    trainer = trainer_for(small_sam, "pt", picture_folder, tmp_path)
    trainer.run()
    trainer.source.samples = trainer.source.samples[1:]
    with pytest.raises(ValueError, match="trains on other pictures"):
        trainer.resume()


@pytest.mark.parametrize("other", [{"blocks": 2}, {"max_offset": 2.0}], ids=["blocks", "max-offset"])
def test_resuming_with_another_plugin_is_refused(small_sam, picture_folder, tmp_path, other):
    """Its parameters have the same names and shapes."""
    trainer = trainer_for(small_sam, "stable", picture_folder, tmp_path)
    trainer.run()
    stabilize(unstabilize(small_sam), DeformableSampler(256, **other))
    (name,) = other
    with pytest.raises(ValueError, match=f"out: expected the plugin of the run in .*'{name}'"):
        trainer.resume()


def test_plugin_for_a_baseline_and_unknown_method_are_refused(small_sam):
    with pytest.raises(ValueError, match="method: expected one of"):
        install_method(small_sam, "prayer")
    with pytest.raises(ValueError, match="plugin: expected None"):
        install_method(small_sam, "pt", DeformableSampler(256))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_a_method_adds_is_on_sams_device(method):
    """The meta device stands for any other than the CPU."""
    with torch.device("meta"):
        sam = new_sam_lite("lite0", 64)
    sam.to("meta")
    install_method(sam, method)
    assert {value.device.type for value in sam.state_dict().values()} == {"meta"}
