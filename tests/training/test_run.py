"""A run from pictures to files: what it leaves behind, and what it says where something is wrong."""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from stable_sam_cuda.data.augmentation import augmented_images
from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.notes import DataWarning
from stable_sam_cuda.sam import plugin_of
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.training.loop import PluginTrainer
from stable_sam_cuda.training.methods import load_method
from stable_sam_cuda.training.record import RunLog
from stable_sam_cuda.training.run import TrainingRun, train_method

RUN = TrainingRun(images=4, epochs=2, seed=3)


def fresh_sam():
    torch.manual_seed(0)
    return new_sam_lite("lite0", 64)


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def samples(picture_folder):
    return find_masked_images(picture_folder)


@pytest.fixture
def interrupted(samples, tmp_path, monkeypatch):
    """A folder with a run that ended after step 2 of 4, and the cache beside it."""
    folder, step = tmp_path / "run", PluginTrainer._train_step

    def stopped(trainer, examples):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return step(trainer, examples)

    with monkeypatch.context() as patched:
        patched.setattr(PluginTrainer, "_train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_method(samples, fresh_sam(), replace(RUN, checkpoint_every=1), folder, cache=tmp_path / "cache")
    return folder


class Heard:
    """A `RunProgress` that remembers."""

    def __init__(self):
        self.stages = []

    def begin(self, stage, total, completed=0):
        self.stages.append([stage, total, completed])

    def advance(self, count=1):
        self.stages[-1][2] += count

    def note(self, text):
        self.text = text


def test_run_leaves_plugin_record_log_and_curves(samples, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sam, heard = fresh_sam(), Heard()
    record = train_method(
        samples, sam, RUN, tmp_path / "run", tensorboard=True, provenance={"split": "train"}, progress=heard
    )
    assert heard.stages == [["embeddings", 8, 8], ["training stable", 4, 4]]
    assert heard.text.startswith("loss ")
    other = fresh_sam()
    assert load_method(other, tmp_path / "run" / "plugin.safetensors").training == record
    assert record["split"] == "train"
    assert record["steps"] == 4
    assert not {"amp", "augment", "time_budget"} & record.keys()
    trained, loaded = plugin_of(sam).state_dict(), plugin_of(other).state_dict()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curves.Reload()
    assert [event.value for event in curves.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    kinds = {kind for line in lines for kind in line["alpha_1"]}
    names = {"loss", "IoU", "learning rate", *(f"alpha_1/{kind}" for kind in kinds)}
    assert set(curves.Tags()["scalars"]) == names


def test_result_depends_on_the_seed_alone(samples, tmp_path):
    results = []
    for place, seed in enumerate((3, 3, 4)):
        torch.manual_seed(100 + place)
        sam = fresh_sam()
        torch.manual_seed(100 + place)
        train_method(samples, sam, replace(RUN, seed=seed), tmp_path / str(place), cache=tmp_path / "cache")
        results.append(torch.cat([value.flatten() for value in plugin_of(sam).state_dict().values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("objects", [1, 3])
def test_a_plugin_of_both_blocks_is_trained_in_both(samples, tmp_path, objects):
    run = replace(RUN, blocks=2, objects=objects)
    sam = fresh_sam()
    record = train_method(samples, sam, run, tmp_path / "run", cache=tmp_path / "cache")
    assert record["blocks"] == 2
    other = fresh_sam()
    load_method(other, tmp_path / "run" / "plugin.safetensors")
    assert plugin_of(other).blocks == 2
    alone = fresh_sam()
    train_method(samples, alone, replace(run, blocks=1), tmp_path / "alone", cache=tmp_path / "cache")
    both, last = (plugin_of(one).offset_network.projection.weight for one in (sam, alone))
    assert not torch.equal(both, last)


def test_more_blocks_than_sam_has_are_refused_before_pictures_are_read(samples, tmp_path):
    with pytest.raises(ValueError, match="plugin: expected one for 1 to 2 blocks"):
        train_method(samples, fresh_sam(), replace(RUN, blocks=3), tmp_path / "run")
    assert not (tmp_path / "run" / "embeddings").exists()


def test_variants_come_into_the_cache_and_the_record(samples, tmp_path):
    heard = Heard()
    run = replace(RUN, augment=2, method="pt", epochs=1)
    record = train_method(samples, fresh_sam(), run, tmp_path / "run", cache=tmp_path / "cache", progress=heard)
    assert heard.stages == [["embeddings", 24, 24], ["training pt", 6, 6]]
    assert record["augment"] == 2
    again = Heard()
    train_method(samples, fresh_sam(), run, tmp_path / "again", cache=tmp_path / "cache", progress=again)
    assert again.stages == heard.stages
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 24


def test_variants_are_reproducible_flipped_and_of_many_scales(samples):
    variants = augmented_images(samples, 30, 64, seed=0)
    assert len({one.name for one in variants}) == len(variants) == 240
    assert variants[0].name.startswith("ellipses/0#0-")
    assert {one.name for one in augmented_images(samples, 1, 64, seed=1)}.isdisjoint(one.name for one in variants)
    shares = []
    for one in variants[::7]:
        (image, ids), (image_again, ids_again) = one.load(), one.load()
        assert image.shape == (64, 64, 3)
        assert (image == image_again).all()
        assert (ids == ids_again).all()
        assert ids.any()
        shares.append((image.any(axis=2)).mean())
    assert min(shares) < 0.1  # shown at a small scale
    assert max(shares) > 0.9  # fills the frame


def test_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 6):
        log.add({"step": step, "loss": float(step), "iou": 0.5})
    log.file.write('{"step": 6, "lo')
    log.close()
    again = RunLog(tmp_path, 3)
    whole = RunLog(tmp_path / "other")
    for step in range(1, 4):
        whole.add({"step": step, "loss": float(step), "iou": 0.5})
    assert again.loss == whole.loss
    again.add({"step": 4, "loss": 9.0, "iou": 0.5})
    again.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_kill_right_after_a_checkpoint_loses_no_line_of_the_log(samples, tmp_path, monkeypatch):
    save = PluginTrainer.save_checkpoint

    def save_and_die(trainer):
        save(trainer)
        raise KeyboardInterrupt

    run = replace(RUN, checkpoint_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(PluginTrainer, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_method(samples, fresh_sam(), run, tmp_path / "run", cache=tmp_path / "cache")
    train_method(samples, fresh_sam(), run, tmp_path / "run", cache=tmp_path / "cache", resume=True)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_full_disk_at_a_checkpoint_keeps_the_one_before(interrupted, samples, tmp_path, monkeypatch):
    before = (interrupted / "checkpoint.pt").read_bytes()
    run = replace(RUN, checkpoint_every=1)
    with monkeypatch.context() as patched:
        patched.setattr("stable_sam_cuda.files.os.fsync", _no_space_for(interrupted / "checkpoint.pt"))
        with pytest.raises(OSError, match="No space left on device"):
            train_method(samples, fresh_sam(), run, interrupted, cache=tmp_path / "cache", resume=True)
    assert (interrupted / "checkpoint.pt").read_bytes() == before
    assert not list(interrupted.glob(".*.part"))
    train_method(samples, fresh_sam(), run, interrupted, cache=tmp_path / "cache", resume=True)
    unbroken = fresh_sam()
    train_method(samples, unbroken, RUN, tmp_path / "unbroken", cache=tmp_path / "cache")
    found = fresh_sam()
    load_method(found, interrupted / "plugin.safetensors")
    expected = plugin_of(unbroken).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in plugin_of(found).state_dict().items())


def _no_space_for(path):
    """fsync on a disk where a checkpoint no longer fits: smaller files still do."""
    size, real = path.stat().st_size // 2, os.fsync

    def fsync(descriptor):
        if os.fstat(descriptor).st_size > size:
            no_space()
        real(descriptor)

    return fsync


def test_disk_too_small_for_the_checkpoints_is_said_before_pictures_are_read(samples, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("stable_sam_cuda.training.run.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"No space left.*checkpoints take 0.00 GiB"):
        train_method(samples, fresh_sam(), RUN, tmp_path / "run")
    assert not (tmp_path / "run" / "embeddings").exists()


def _changed(path, **values):
    state = torch.load(path, weights_only=True)
    torch.save(state | values, path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"no checkpoint"),
    "bits of a weight": lambda path: path.write_bytes(_flipped(path.read_bytes(), 0.5)),
    "a list": lambda path: torch.save([1], path),
    "no parameters": lambda path: _changed(path, parameters=None),
    "other shapes": lambda path: _changed(path, parameters=_reshaped(path)),
    "step of letters": lambda path: _changed(path, step="two"),
    "optimiser": lambda path: _changed(path, optimizer={"state": 3}),
    "samples": lambda path: _changed(path, samples={"names": 1}),
}


def _flipped(content, part):
    place = int(len(content) * part)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _reshaped(path):
    return {name: value[..., None] for name, value in torch.load(path, weights_only=True)["parameters"].items()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_and_left_alone(damage, interrupted, samples, tmp_path):
    path = interrupted / "checkpoint.pt"
    DAMAGE[damage](path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="out: expected a whole checkpoint"):
        train_method(samples, fresh_sam(), RUN, interrupted, cache=tmp_path / "cache", resume=True)
    assert path.read_bytes() == content


@pytest.fixture
def data(picture_folder, tmp_path):
    return shutil.copytree(picture_folder, tmp_path / "data")


def _repaint(path):
    cv2.imwrite(str(path), 255 - cv2.imread(str(path)))


def _remask(path):
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    mask[0, 0] = 1
    cv2.imwrite(str(path), mask)


OTHER_DATA = {
    "picture": (lambda data: _repaint(data / "ovals/images/2.png"), r"1 changed \(the first is ovals/2\)"),
    "mask": (lambda data: _remask(data / "ovals/masks/2.png"), r"1 changed \(the first is ovals/2\)"),
    "two": (
        lambda data: [_repaint(data / f"{name}/images/1.png") for name in ("ovals", "ellipses")],
        r"2 changed \(the first is ellipses/1\)",
    ),
    "missing": (
        lambda data: [(data / "ovals" / part / "0.png").unlink() for part in ("images", "masks")],
        r"1 missing \(the first is ovals/0\)",
    ),
    "added": (
        lambda data: [shutil.copy(data / "ovals" / part / "0.png", data / "ovals" / part / "9.png")
                      for part in ("images", "masks")],
        r"1 new \(the first is ovals/9\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "method"), [*((change, "pt") for change in OTHER_DATA), ("picture", "ft")])
def test_a_run_goes_on_with_the_same_pictures_and_objects_alone(change, method, data, tmp_path):
    run, edit = replace(RUN, method=method, epochs=1), OTHER_DATA[change]
    train_method(find_masked_images(data), fresh_sam(), run, tmp_path / "run", cache=tmp_path / "cache")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    edit[0](data)
    with pytest.raises(ValueError, match=f"trains on other pictures: {edit[1]}"):
        train_method(
            find_masked_images(data), fresh_sam(), run, tmp_path / "run", cache=tmp_path / "cache", resume=True
        )
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_other_order_and_other_base_models_are_refused(interrupted, samples, tmp_path):
    options = {"cache": tmp_path / "cache", "resume": True}
    with pytest.raises(ValueError, match=r"trains on other pictures: 8 in another order \(the first is ovals/3\)"):
        train_method(samples[::-1], fresh_sam(), RUN, interrupted, **options)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="trains another base model"):
        train_method(samples, new_sam_lite("lite0", 64), RUN, interrupted, **options)


def test_a_checkpoint_of_an_earlier_version_goes_on_by_names(interrupted, samples, tmp_path):
    path = interrupted / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["samples"], state["base"]
    names = hashlib.sha256("\n".join(one.name for one in samples).encode()).hexdigest()
    torch.save(state | {"pictures": names}, path)
    with pytest.warns(DataWarning, match="earlier version"), pytest.raises(ValueError, match="trains on other"):
        train_method(samples[1:], fresh_sam(), RUN, interrupted, cache=tmp_path / "cache", resume=True)
    with pytest.warns(DataWarning, match="earlier version"):
        record = train_method(samples, fresh_sam(), RUN, interrupted, cache=tmp_path / "cache", resume=True)
    assert record["steps"] == 4


def test_results_of_another_run_are_replaced_on_request_alone(samples, tmp_path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    train_method(samples, fresh_sam(), RUN, out, cache=cache)
    for kept in (["checkpoint.pt", "plugin.safetensors", "log.jsonl"], ["plugin.safetensors"], ["log.jsonl"]):
        for path in out.iterdir():
            if path.name not in kept:
                path.unlink()
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(ValueError, match=r"out: expected .*which holds .*--overwrite replaces"):
            train_method(samples, fresh_sam(), RUN, out, cache=cache)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        train_method(samples, fresh_sam(), replace(RUN, epochs=1), out, cache=cache, overwrite=True)
        assert len((out / "log.jsonl").read_text().splitlines()) == 2
    (out / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"holds plugin.safetensors and no checkpoint.pt"):
        train_method(samples, fresh_sam(), RUN, out, cache=cache, resume=True)
    with pytest.raises(ValueError, match="overwrite: expected none with resume"):
        train_method(samples, fresh_sam(), RUN, out, cache=cache, resume=True, overwrite=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_is_resumed_from_the_beginning(samples, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1.0, "iou": 0.5}\n')
    record = train_method(samples, fresh_sam(), RUN, tmp_path / "run", cache=tmp_path / "cache", resume=True)
    assert record["steps"] == 4


def test_folders_that_cannot_be_made_are_named_with_the_one_above(samples, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("out", "cache"):
        folders = {"out": tmp_path / "run", "cache": tmp_path / "cache"} | {name: tmp_path / "file" / "a" / "b"}
        with pytest.raises(ValueError, match=rf"{name}: expected a folder .* it cannot be made in .*/file: Not a dir"):
            train_method(samples, fresh_sam(), RUN, **folders)


def test_what_a_kill_left_of_a_checkpoint_is_cleared_away(interrupted, samples, tmp_path):
    (interrupted / ".checkpoint.pt.0123abcd.part").write_bytes(b"half")
    train_method(samples, fresh_sam(), RUN, interrupted, cache=tmp_path / "cache", resume=True)
    assert not list(interrupted.glob(".*.part"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "prayer"}, "method: expected one of"),
        ({"occluded_masks": "half"}, "occluded-masks: expected visible or whole"),
        ({"augment": -1}, "augment: expected at least 0"),
        ({"mix": "boxes=1"}, "mix: expected KIND=FREQUENCY"),
        ({"mix": "noisy_box=1", "robust": False}, "mix: expected none with no-robust"),
        ({"amp": "fp16"}, "fp16 needs a CUDA device"),
        ({"amplitude": "loud"}, "amplitude: expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_told_before_any_embedding_is_computed(change, message, samples, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_method(samples, fresh_sam(), replace(RUN, **change), tmp_path / "run", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_out_that_cannot_be_written_or_holds_a_run_is_refused(interrupted, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: expected a folder that can be written, got .*file/run"):
        train_method(samples, fresh_sam(), RUN, tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="which holds a run"):
        train_method(samples, fresh_sam(), RUN, interrupted)


def test_objects_of_one_pixel_are_passed_over(picture_folder, tmp_path):
    """They cover less of the frame than is trained on."""
    root = shutil.copytree(picture_folder / "ovals", tmp_path / "ovals")
    dot = np.zeros(cv2.imread(str(root / "masks" / "0.png"), cv2.IMREAD_UNCHANGED).shape, np.uint8)
    dot[5, 5] = 1
    cv2.imwrite(str(root / "masks" / "0.png"), dot)
    run = replace(RUN, method="pt", images=1, epochs=1)
    assert train_method(find_masked_images(root), fresh_sam(), run, tmp_path / "run")["steps"] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(line["loss"] is line["iou"] is None for line in lines) == 1
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()
