"""``stable-sam automask``: what it writes, and that nothing is written when something is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segment_anything.utils.amg import rle_to_mask
from typer.testing import CliRunner, Result

from stable_sam_cuda.cli import app

Automask = Callable[..., Result]

# The model has random weights: whatever it says is a mask.
EVERYTHING = ["--points-per-side", "2", "--min-score", "0", "--min-stability", "0", "--max-overlap", "0.9"]
FILES = ["photo_automask.json", "photo_automask_ids.png", "photo_automask_overlay.png"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def automask(checkpoint: Path, plugin: Path, photo: Path, out: Path) -> Automask:
    def run(*arguments: str, photo: Path = photo) -> Result:
        weights = ["--checkpoint", str(checkpoint), "--plugin", str(plugin), "--device", "cpu"]
        command = ["automask", str(photo), "--out", str(out), *weights, *arguments]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    return run


def test_writes_ids_overlay_and_record(automask: Automask, out: Path, plugin: Path) -> None:
    result = automask(*EVERYTHING, "--rle")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == FILES
    record = json.loads((out / FILES[0]).read_text())
    assert (record["model"], record["plugin"], record["device"]) == ("sam_lite", str(plugin), "cpu")
    assert record["backend"] in ("cpu", "reference") and record["attention"] in ("fused", "sampled")
    assert all(value > 0 for value in record["timings_ms"].values())
    assert record["versions"]["torch"] is not None

    ids = np.asarray(Image.open(out / FILES[1]))
    assert ids.shape == (150, 200)
    expected = np.zeros_like(ids)
    sizes = []
    for number, entry in enumerate(record["objects"], start=1):
        assert entry["id"] == number
        mask = rle_to_mask(entry["segmentation"])
        assert mask.sum() == entry["pixels"]
        sizes.append(entry["pixels"])
        expected[mask] = number
    assert sizes and sizes == sorted(sizes, reverse=True), "smaller objects lie on top"
    assert np.array_equal(ids, expected)
    assert Image.open(out / FILES[2]).size == (200, 150)


def test_nothing_found_is_told(automask: Automask, out: Path) -> None:
    result = automask("--points-per-side", "2", "--min-stability", "1", "--min-score", "1", "--plugin", "none")
    assert result.exit_code == 0, result.output
    assert "0 objects" in result.stdout
    record = json.loads((out / FILES[0]).read_text())
    assert record["objects"] == [] and record["backend"] is None and record["attention"] is None
    assert not np.asarray(Image.open(out / FILES[1])).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points-per-side", "0"], "--points-per-side: expected 1 to 147, got 0"),
        (["--points-per-side", "1000"], "--points-per-side: expected 1 to 147, got 1000"),
        (["--min-score", "1.5"], "--min-score: expected a number from 0 to 1, got 1.5"),
        (["--min-stability", "nan"], "--min-stability: expected a number from 0 to 1, got nan"),
        (["--max-overlap", "-1"], "--max-overlap: expected a number from 0 to 1, got -1"),
        (["--crop-layers", "9"], "--crop-layers: expected 0 to 3, got 9"),
        (["--plugin", "no_such_plugin"], "got 'no_such_plugin'"),
        (["--model", "vit_x"], "expected one of vit_b, vit_l, vit_h, sam_lite, got 'vit_x'"),
        (["--backend", "fpga"], "backend: expected one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(automask: Automask, out: Path, arguments: list[str], message: str) -> None:
    assert_refused(automask(*arguments), out, message)


def test_bad_photo(automask: Automask, out: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    assert_refused(automask(photo=bad), out, f"photo {bad}: expected")


def assert_refused(result: Result, out: Path, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not out.exists()


def test_boxes_are_named_as_coco_has_them(automask: Automask, out: Path) -> None:
    """x, y, width, height; a ``box`` is x0, y0, x1, y1 in every record."""
    assert automask(*EVERYTHING, "--rle").exit_code == 0
    for entry in json.loads((out / FILES[0]).read_text())["objects"]:
        assert "box" not in entry
        rows, columns = np.nonzero(rle_to_mask(entry["segmentation"]))
        x, y, width, height = entry["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max(), rows.max())


def test_thresholds_are_those_of_the_model_unless_given(automask: Automask, out: Path) -> None:
    assert automask("--points-per-side", "1", "--min-stability", "0.25").exit_code == 0
    record = json.loads((out / FILES[0]).read_text())
    assert (record["min_score"], record["min_stability"]) == (0.5, 0.25)


@pytest.mark.parametrize("name", FILES)
def test_files_of_somebody_else_are_kept(automask: Automask, out: Path, name: str) -> None:
    out.mkdir()
    (out / name).write_text("mine")
    result = automask(*EVERYTHING)
    assert (result.exit_code, f"got {name} (--overwrite replaces them)" in result.stderr) == (2, True)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]
    assert automask(*EVERYTHING, "--overwrite").exit_code == 0
    assert automask(*EVERYTHING).exit_code == 0, "its own results are replaced without a word"
