"""``stable-sam train`` and ``evaluate`` from end to end, on drawn pictures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner, Result

from stable_sam_cuda.cli import app
from stable_sam_cuda.training.interruption import Interrupted, Terminated


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of a bright disc on noise, and one whose mask is missing."""
    root = tmp_path_factory.mktemp("data") / "discs"
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    rows, columns = np.mgrid[:100, :120]
    for stem in range(7):
        mask = np.hypot(rows - rng.integers(40, 60), columns - rng.integers(40, 80)) < 25
        pixels = rng.integers(0, 100, (100, 120, 3)).astype(np.uint8)
        pixels[mask] = rng.integers(150, 255, 3)
        Image.fromarray(pixels).save(root / "images" / f"{stem}.png")
        if stem < 6:
            Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"{stem}.png")
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_training_with_occlusions_and_evaluating_on_every_kind(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    weights = ("--checkpoint", checkpoint)
    out = tmp_path / "run"
    result = run("train", "--data", data, "--out", out, *weights, "--method", "pt", "--occlusions", 3)
    assert result.exit_code == 0, result.output
    assert "skipped discs/6: mask" in result.output
    assert "1 of 7 pictures skipped" in result.output
    assert (out / "pt.safetensors").is_file()
    assert len((out / "log.jsonl").read_text().splitlines()) == 3  # 9 pictures, 4 a step
    sheet = Image.open(out / "occlusions.png")
    assert sheet.width > 6 * 240

    refused = run("train", "--data", data, "--out", out, *weights, "--method", "pt", "--resume")
    assert refused.exit_code == 2
    assert "trains on other pictures" in refused.output

    kinds = "gt_box,box_50_60,coarse_mask"
    arguments = ("--plugin", "none", "--prompts", kinds, "--draws", 2, "--every", 3)
    result = run("evaluate", "--data", data, "--out", tmp_path / "values", *weights, *arguments)
    assert result.exit_code == 0, result.output
    objects = json.loads((tmp_path / "values" / "results.json").read_text())["objects"]
    assert sorted({one["kind"] for one in objects}) == sorted(kinds.split(","))
    assert len(objects) == 2 * 3


def test_average_precision_on_a_coco_file(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    square = {"bbox": [30, 40, 50, 40], "segmentation": [[30, 40, 80, 40, 80, 80, 30, 80]], "category_id": 1}
    content = {
        "images": [{"id": 5, "file_name": "0.png", "height": 100, "width": 120}],
        "annotations": [{**square, "id": 1, "image_id": 5, "area": 2000, "iscrowd": 0}],
    }
    path = data / "images" / "squares.json"
    path.write_text(json.dumps(content))
    arguments = ("--checkpoint", checkpoint, "--plugin", "none", "--prompts", "gt_box,box_50_60", "--draws", 2)
    result = run("evaluate", "--data", path, "--out", tmp_path, *arguments, "--average-precision")
    assert result.exit_code == 0, result.output
    assert "COCO average precision" in result.output
    record = json.loads((tmp_path / "results.json").read_text())
    assert set(record["average_precision"]) == {"gt_box", "box_50_60"}
    assert 0 <= record["average_precision"]["box_50_60"]["predicted_iou"]["ap"] <= 100
    assert {one["set_name"] for one in record["objects"]} == {"squares"}


def test_an_unknown_layout_and_an_unknown_choice_of_masks_are_refused(data: Path, tmp_path: Path) -> None:
    result = run("train", "--data", data, "--out", tmp_path, "--layout", "zip")
    assert (result.exit_code, "layout: expected one of" in result.output) == (2, True)
    result = run("train", "--data", data, "--out", tmp_path, "--occlusions", 1, "--occluded-masks", "half")
    assert (result.exit_code, "expected visible or whole" in result.output) == (2, True)


def test_every_option_of_a_short_run(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A minute's budget is cut to a moment; what the options say is in the record."""
    out = tmp_path / "run"
    options = ("--method", "ft", "--images", 2, "--accumulate", 2, "--together", 2, "--amp", "bf16", "--augment", 1)
    more = ("--time-budget", 0.01, "--lr", 1e-5, "--tensorboard", "--checkpoint-every", 3, "--mix", "coarse_mask=1")
    result = run("train", "--data", data, "--out", out, "--checkpoint", checkpoint, *options, *more)
    assert result.exit_code == 0, result.output
    assert not (out / "embeddings").exists()
    with safe_open(out / "ft.safetensors", "pt") as file:
        record = json.loads(file.metadata()["training"])
    expected = {"accumulate": 2, "together": 2, "amp": "bf16", "augment": 1, "time_budget": 0.01, "pictures": 6}
    expected["mix"] = "coarse_mask=1"
    assert record.items() >= expected.items()
    assert record["minutes"] >= 0.01
    assert list((out / "tensorboard").iterdir())
    again = run("train", "--data", data, "--out", out, "--checkpoint", checkpoint, *options, *more)
    assert (again.exit_code, "which holds a run" in again.output) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "prayer"), "method: expected one of stable"),
        (("--amp", "fp16"), "fp16 needs a CUDA device"),
        (("--device", "cuda:9"), "device: expected"),
        (("--lr", 0), "lr: expected a finite number above 0"),
        (("--cache", "FILE"), "FILE"),
        (("--out", "FILE"), "out: expected a folder that can be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_line(options: tuple, message: str, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("")
    words = [tmp_path / "FILE" if word == "FILE" else word for word in options]
    result = run("train", "--data", data, "--out", tmp_path / "out", "--checkpoint", checkpoint, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("error: ") == 1


def test_missing_tensorboard_is_said_before_anything_is_done(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = run("train", "--data", data, "--out", tmp_path, "--checkpoint", checkpoint, "--tensorboard")
    assert result.exit_code == 2
    assert "--tensorboard needs TensorBoard: " in result.output and "pip install" in result.output
    assert "skipped" not in result.output
    assert not (tmp_path / "embeddings").exists()


def test_a_run_is_replaced_when_told_so(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = ("train", "--data", data, "--out", tmp_path, "--checkpoint", checkpoint, "--images", 6)
    assert run(*words).exit_code == 0
    before = (tmp_path / "plugin.safetensors").read_bytes()
    refused = run(*words, "--seed", 1)
    assert (refused.exit_code, refused.stderr.startswith("error: --out: expected")) == (2, True)
    assert (tmp_path / "plugin.safetensors").read_bytes() == before
    result = run(*words, "--seed", 1, "--overwrite")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plugin.safetensors").read_bytes() != before
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("ended", "code"), [(Interrupted(7), 130), (Terminated(7), 143)], ids=lambda value: type(value).__name__
)
def test_an_interrupted_run_says_where_it_is(
    ended: BaseException, code: int, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stable_sam_cuda.training import run as module

    def train_method(*arguments: object, **options: object) -> None:
        raise ended

    monkeypatch.setattr(module, "train_method", train_method)
    result = run("train", "--data", data, "--out", tmp_path, "--checkpoint", checkpoint)
    assert result.exit_code == code
    assert result.stderr.endswith(f"note: interrupted; {tmp_path} has a checkpoint at step 7; --resume continues\n")
