"""Results appear all together or not at all."""

from pathlib import Path

import pytest
from PIL import Image

from stable_sam_cuda.cli.output import Outputs


def test_files_appear_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with Outputs(target) as outputs:
        outputs.picture("mask.png", Image.new("L", (2, 2)))
        outputs.record("record.json", {"score": 0.5})
        assert not (target / "mask.png").exists()
    assert sorted(path.name for path in target.iterdir()) == ["mask.png", "record.json"]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Outputs(tmp_path / "a" / "b") as outputs:
        outputs.picture("mask.png", Image.new("L", (2, 2)))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_earlier_results_survive_an_error(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("earlier")
    with pytest.raises(ValueError), Outputs(tmp_path) as outputs:
        outputs.record("record.json", {"score": float("nan")})  # JSON has no NaN
    assert (tmp_path / "record.json").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"--out .*file/below: expected a directory"),
        Outputs(tmp_path / "file" / "below"),
    ):
        pass


def test_file_name_taken_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out" / "record.json").mkdir(parents=True)
    with pytest.raises(OSError, match="got a directory there"), Outputs(tmp_path / "out") as outputs:
        outputs.picture("mask.png", Image.new("L", (2, 2)))
        outputs.record("record.json", {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["record.json"]
