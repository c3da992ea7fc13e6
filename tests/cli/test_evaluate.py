"""``stable-sam evaluate``: its results are kept, and are not put over those of other settings."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from stable_sam_cuda.cli import app
from stable_sam_cuda.cli.console import table_lines
from stable_sam_cuda.evaluation import coco, report
from stable_sam_cuda.evaluation.protocol import ObjectResult
from stable_sam_cuda.notes import printable
from stable_sam_cuda.sam.weight_files import read_safetensors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of a set whose name rich would take for markup, with a square on it; also as a COCO file."""
    root = tmp_path_factory.mktemp("data")
    for part in ("images", "masks"):
        (root / "[red]squares" / part).mkdir(parents=True)
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 20:60] = 255
    Image.fromarray(mask).convert("RGB").save(root / "[red]squares" / "images" / "0.png")
    Image.fromarray(mask).save(root / "[red]squares" / "masks" / "0.png")
    square = {"bbox": [20, 20, 40, 20], "segmentation": [[20, 20, 60, 20, 60, 40, 20, 40]], "category_id": 1}
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": 60, "width": 80}],
        "annotations": [{**square, "id": 1, "image_id": 1, "area": 800, "iscrowd": 0}],
    }
    coco = root / "coco"
    coco.mkdir()
    (coco / "squares.json").write_text(json.dumps(content))
    Image.fromarray(mask).convert("RGB").save(coco / "0.png")
    return root


@pytest.fixture
def run(data: Path, checkpoint: Path, tmp_path: Path):
    def evaluate(*words: object, data: Path = data / "[red]squares", out: Path = tmp_path / "out") -> Result:
        options = ("--checkpoint", checkpoint, "--plugin", "none", "--prompts", "gt_box", "--draws", 1)
        command = ["evaluate", "--data", data, "--out", out, *options, *words]
        return CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)

    return evaluate


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_settings_replace_their_results_and_others_do_not(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run()
    assert first.exit_code == 0, first.output
    assert "[red]squares" in first.stdout
    assert first.stdout.splitlines()[-1] == f"results: {out / 'results.json'}"
    before = contents(out)
    assert set(before) == {"results.json", "results.csv"}
    assert run().exit_code == 0
    assert contents(out) == before
    for words in (("--draws", 2), ("--seed", 1), ("--masks", "binary"), ("--prompts", "1_point")):
        refused = run(*words)
        assert refused.exit_code == 2
        assert "got results.csv, results.json (--overwrite replaces them)" in refused.stderr
    assert contents(out) == before
    assert run("--seed", 1, "--overwrite").exit_code == 0
    assert json.loads((out / "results.json").read_text())["seed"] == 1


@pytest.mark.parametrize("changed", ["picture", "mask", "checkpoint"])
def test_results_of_what_has_changed_under_its_name_are_kept(
    run, data: Path, checkpoint: Path, tmp_path: Path, changed: str
) -> None:
    shutil.copytree(data / "[red]squares", tmp_path / "data")
    own = tmp_path / "own.safetensors"
    own.write_bytes(checkpoint.read_bytes())
    assert run("--checkpoint", own, data=tmp_path / "data").exit_code == 0
    before = contents(tmp_path / "out")
    if changed == "checkpoint":
        state, metadata = read_safetensors(own, "checkpoint")
        state = {name: value * 0.999 if value.is_floating_point() else value for name, value in state.items()}
        save_file(state, own, metadata)
    else:
        [path] = (tmp_path / "data" / f"{changed}s".replace("picture", "image")).iterdir()
        pixels = np.array(Image.open(path))
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(path)
    refused = run("--checkpoint", own, data=tmp_path / "data")
    assert refused.exit_code == 2 and "(--overwrite replaces them)" in refused.stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["results.json", "results.csv"])
def test_files_of_somebody_else_are_kept(run, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    refused = run()
    assert (refused.exit_code, f"got {name} " in refused.stderr) == (2, True)
    assert contents(out) == {name: b"{}"}


def test_what_is_finished_is_kept_where_the_average_precision_fails(
    run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(coco, "precision_by_kind", fail)
    result = run("--average-precision", data=data / "coco" / "squares.json")
    assert (result.exit_code, result.stderr) == (2, "error: No space left on device\n")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["summary"]["gt_box"] and "average_precision" not in record


def test_the_average_precision_joins_the_results(run, data: Path, tmp_path: Path) -> None:
    result = run("--average-precision", data=data / "coco" / "squares.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    small = record["average_precision"]["gt_box"]["score_1"]
    assert small["ap_large"] is None and small["ap"] is not None
    assert " - " in result.stdout


@pytest.mark.parametrize("prompts", ["noisy_box", "1_point,3_points"])
def test_average_precision_of_kinds_that_have_none_is_refused_at_once(run, data: Path, prompts: str) -> None:
    result = run("--average-precision", "--prompts", prompts, data=data / "coco" / "squares.json")
    assert (result.exit_code, result.stderr.startswith("error: --prompts: expected")) == (2, True)
    assert result.stdout == ""


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_devices_as_in_the_other_verbs(run, device: str) -> None:
    assert run("--device", device).exit_code == 0


@pytest.mark.parametrize("name", ["[/x]", "[red]a", "a\x1b[31m", "caf\udce9"], ids=ascii)
def test_names_in_tables_are_text(name: str) -> None:
    one = ObjectResult(name, f"{name}/0", 0, 0.1, "gt_box", 1, 0.5, 0.5, 1.0)
    lines = table_lines(report.paper_table([one], f"plugin {name}"))
    assert lines.count(printable(name)) == 2


def test_a_wide_table_is_not_folded_where_there_is_no_terminal() -> None:
    one = ObjectResult("s" * 300, "0", 0, 0.1, "gt_box", 1, 0.5, 0.5, 1.0)
    assert "s" * 300 in table_lines(report.paper_table([one], "title"))


def test_a_full_disk_under_the_output_costs_no_results(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = [str(Path(sys.executable).with_name("stable-sam")), "evaluate", "--data", str(data / "[red]squares")]
    command += ["--out", str(tmp_path / "out"), "--checkpoint", str(checkpoint), "--plugin", "none"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--draws", "1"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: standard output: could not be written (No space left on device)")
    assert set(contents(tmp_path / "out")) == {"results.json", "results.csv"}


def test_a_report_is_json_whatever_the_numbers_and_names(tmp_path: Path) -> None:
    one = ObjectResult("caf\udce9", "caf\udce9/0", 0, 0.1, "gt_box", 1, float("nan"), float("inf"), 1.0)
    report.write_report([one], tmp_path, {"note": float("nan"), "seen": (1, {"x": float("-inf")})})
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert record["note"] is None and record["seen"] == [1, {"x": None}]
    assert record["objects"][0]["picture"] == r"caf\xe9/0"
    assert record["objects"][0]["iou"] is None
    assert r"caf\xe9/0" in (tmp_path / "results.csv").read_text(encoding="utf-8")
