"""One step of training: whatever the grouping of pictures, the precision and the source of embeddings."""

import math

import pytest
import torch

from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.embeddings import EmbeddingCache
from stable_sam_cuda.data.prompts import PromptMix
from stable_sam_cuda.training.loop import PluginTrainer
from stable_sam_cuda.training.methods import install_method
from stable_sam_cuda.training.options import TrainingOptions
from stable_sam_cuda.training.pictures import CachedPictures, EncodedPictures
from stable_sam_cuda.training.step import cosine

ALL_KINDS = ("gt_box", "one_point", "coarse_mask", "mixed")


def only(kind):
    if kind == "mixed":
        return PromptMix()
    return PromptMix(**{name: float(name == kind) for name in vars(PromptMix())})


@pytest.fixture
def start(small_sam, picture_folder, tmp_path):
    """A function that begins a run of the same weights with other options."""
    samples = find_masked_images(picture_folder)
    cache = EmbeddingCache(tmp_path / "cache", small_sam, samples)
    cache.fill()
    torch.manual_seed(1)
    parameters = install_method(small_sam, "stable")
    weights = {name: value.detach().clone() for name, value in parameters.items()}

    def begin(folder="run", source=None, **options):
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(weights[name])
                value.grad = None
        source = source or CachedPictures(small_sam, cache)
        return PluginTrainer(small_sam, parameters, source, tmp_path / folder, TrainingOptions(**options))

    return begin


def gradients_and_record(trainer):
    trainer.optimizer.step = lambda: None
    with trainer.probe:
        record = trainer._train_step(trainer._examples())
    return {name: value.grad.clone() for name, value in trainer.parameters.items()}, record


def test_accumulated_groups_are_one_large_step(start):
    large, record = gradients_and_record(start(images=6))
    for images, accumulate in ((3, 2), (2, 3), (1, 6)):
        parts, again = gradients_and_record(start(images=images, accumulate=accumulate))
        assert again == record
        for name, gradient in large.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-7)
    trainer = start(images=2, accumulate=3, epochs=2)
    assert trainer.steps == 4  # 8 pictures: 6 and 2
    assert [len(trainer._pictures(step)) for step in range(4)] == [6, 2, 6, 2]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pictures_at_once_are_pictures_one_by_one(kind, start):
    """Uneven groups of 3 and 1 pictures, with one or two objects each."""
    alone, record = gradients_and_record(start(mix=only(kind), objects=2, minimum_area=0.07))
    counts = [
        len(start(minimum_area=0.07)._chosen(start().source.example(i).masks, torch.Generator())) for i in range(8)
    ]
    assert len(set(counts)) > 1, counts
    together, again = gradients_and_record(start(mix=only(kind), objects=2, minimum_area=0.07, together=3))
    for key in ("loss", "iou", "alpha_1", "lr"):
        assert again[key] == pytest.approx(record[key], rel=1e-4), key
    assert record["kinds"] == again["kinds"]
    assert len(set(record["kinds"])) == (1 if kind != "mixed" else 3)
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=2e-5)


def test_bf16_is_near_float32_and_leaves_parameters_in_it(start):
    exact, record = gradients_and_record(start(mix=only("gt_box")))
    rough, again = gradients_and_record(start(mix=only("gt_box"), amp="bf16"))
    assert again["loss"] == pytest.approx(record["loss"], rel=0.02)
    assert again["loss"] != record["loss"]
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32
        if exact[name].abs().max() > 1e-4:
            cosine_similarity = torch.nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
            assert cosine_similarity > 0.9, name
    trainer = start(amp="bf16", epochs=1)
    trainer.run()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trainer.parameters.values())


def test_encoder_in_the_loop_gives_the_caches_gradients_and_its_own(small_sam, picture_folder, start):
    """The plugin's gradients agree to the float16 of the cache; with ft, the encoder has gradients, too."""
    source = EncodedPictures(small_sam, find_masked_images(picture_folder))
    cached, record = gradients_and_record(start(mix=only("gt_box")))
    encoded, again = gradients_and_record(start(mix=only("gt_box"), source=source))
    assert again["loss"] == pytest.approx(record["loss"], rel=1e-2)
    name = max(cached, key=lambda name: cached[name].abs().max())
    assert torch.nn.functional.cosine_similarity(encoded[name].flatten(), cached[name].flatten(), dim=0) > 0.99


def test_ft_trains_every_part_of_sam(small_sam, picture_folder, tmp_path):
    parameters = install_method(small_sam, "ft")
    assert len(parameters) == len(list(small_sam.parameters()))
    source = EncodedPictures(small_sam, find_masked_images(picture_folder))
    trainer = PluginTrainer(small_sam, parameters, source, tmp_path / "run", TrainingOptions(lr=1e-4, epochs=3))
    losses = []
    before = {name: value.detach().clone() for name, value in parameters.items()}
    trainer.run(lambda record: losses.append(record["loss"]))
    parts = {name.split(".")[0] for name, value in parameters.items() if not torch.equal(value, before[name])}
    assert parts == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert losses[-1] < losses[0]


def test_record_names_kind_rate_and_what_the_router_does(start):
    trainer = start(epochs=2)
    records = []
    trainer.run(records.append)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["lr"] for record in records] == [5e-4 * cosine(step / 4) for step in range(4)]
    assert all(0 < alpha < 1 for record in records for alpha in record["alpha_1"].values())
    drawn = [kind for record in records for kind in record["kinds"]]
    assert len(drawn) == 16 and len(set(drawn)) > 1 and set(drawn) <= set(vars(PromptMix()))
    assert all(record["alpha_1"].keys() == set(record["kinds"]) for record in records)
    assert not any(module._forward_hooks for module in trainer.sam.modules())


def test_time_budget_ends_the_run_and_moves_the_rate(start, monkeypatch):
    """A clock that ticks 6 s at every look: the minutes used decide, in a resumed run as well."""
    ticks = iter(range(0, 10**6, 6))
    monkeypatch.setattr("stable_sam_cuda.training.loop.time.perf_counter", lambda: float(next(ticks)))
    trainer = start(time_budget=2.0, checkpoint_every=1)
    records = []

    def stop_before_four_is_saved(record):
        if len(records) == 3:
            raise KeyboardInterrupt
        records.append(record)

    with pytest.raises(KeyboardInterrupt):
        trainer.run(stop_before_four_is_saved)
    used = trainer.saved_minutes
    assert 0 < used < 2
    resumed = start(time_budget=2.0)
    resumed.resume()
    assert resumed.minutes == used
    resumed.run(records.append)
    assert resumed.minutes >= 2
    assert [record["step"] for record in records] == list(range(1, resumed.step + 1))
    assert resumed.step > resumed.steps  # more than the one epoch that it would have been
    rates = [record["lr"] for record in records]
    assert rates == sorted(rates, reverse=True)
    assert rates[3] == pytest.approx(5e-4 * cosine(used / 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: expected a finite number above 0"),
        ({"lr": math.nan}, "lr: expected a finite number above 0"),
        ({"loss": "l2"}, "loss: expected one of mask, points"),
        ({"amp": "fp8"}, "amp: expected one of off, bf16, fp16"),
        ({"amp": "fp16"}, "fp16 needs a CUDA device"),
        ({"time_budget": 0.0}, "time-budget: expected minutes above 0"),
        ({"accumulate": 0}, "accumulate: expected at least 1"),
        ({"together": 0}, "together: expected at least 1"),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(options, message, start):
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_no_object_large_enough_is_said_after_one_epoch(start, tmp_path):
    with pytest.raises(ValueError, match=r"cover at least 90.0% of the frame, got none in 8 pictures"):
        start(minimum_area=0.9, epochs=50).run()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(start, tmp_path):
    trainer = start(epochs=5, checkpoint_every=1)

    save = trainer.save_checkpoint

    def save_and_spoil():
        save()
        if trainer.step == 2:
            with torch.no_grad():
                next(iter(trainer.parameters.values())).fill_(torch.nan)

    trainer.save_checkpoint = save_and_spoil
    with pytest.raises(ValueError, match="lr: expected a run that stays finite"):
        trainer.run()
    again = start(epochs=5)
    again.resume()
    assert again.step == 2
    assert all(value.isfinite().all() for value in again.parameters.values())
