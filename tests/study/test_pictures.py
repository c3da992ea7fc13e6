"""The sheets of best and worst cases."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from stable_sam_cuda.cli import app

BEFORE = {("a", 0): 0.5, ("a", 1): 0.2, ("b", 0): 0.9, ("c", 0): 0.1, ("d", 0): 0.6}
AFTER = {("a", 0): 0.9, ("a", 1): 0.5, ("b", 0): 0.4, ("c", 0): 0.2, ("d", 0): 0.6}


def test_sheets_show_each_picture_once_the_most_telling_first():
    from pictures import chosen

    assert chosen(BEFORE, AFTER, 2) == {
        "gains": [("a", 0), ("c", 0)],
        "losses": [("b", 0), ("d", 0)],
        "failures": [("c", 0), ("b", 0)],
    }


@pytest.mark.slow
def test_sheets_of_two_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pictures
    from rehearsal import draw_data
    from typer.testing import CliRunner

    from stable_sam_cuda.sam.plugin_io import shipped_plugins

    draw_data(tmp_path / "data")
    weights = shipped_plugins()["stable_sam_lite"]
    for name, plugin in (("base", "none"), ("plugin", str(weights))):
        words = [
            "evaluate",
            "--data",
            str(tmp_path / "data"),
            "--split",
            "val",
            "--prompts",
            "noisy_box",
            "--draws",
            "2",
        ]
        result = CliRunner().invoke(app, [*words, "--draws", "2", "--plugin", plugin, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    objects = json.loads((tmp_path / "base" / "results.json").read_text())["objects"]
    assert len(objects) == 8
    arguments = ["--data", tmp_path / "data", "--base", tmp_path / "base", "--plugin", tmp_path / "plugin"]
    arguments += ["--weights", weights, "--count", 2, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, arguments)])
    pictures.main()
    sheets = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sheets.keys() == {"gains.jpg", "losses.jpg", "failures.jpg"}
    assert all(width > 3 * 200 and height > 2 * 200 for width, height in sheets.values())
