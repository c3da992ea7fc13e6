"""Which record is one of a row on this base, and where the work on a base is kept."""

import hashlib
import json

import pytest

COMMANDS = {"train": None, "evaluate": {"val": {"draws": 3}}}


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"weights")
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("named", "given", "valid"),
    [
        ("none", False, True),
        ("none", True, False),
        ("own", False, True),
        ("own", True, False),
        ("other", False, False),
        ("other", True, True),
    ],
    ids=lambda value: {True: "yes", False: "no"}.get(value, value),
)
def test_a_record_counts_for_the_base_it_names(named, given, valid, base, tmp_path):
    """A record that names no base is from before they were named, and of the package's own weights."""
    from run import SHIPPED_CHECKPOINT, is_recorded

    digests = {"own": digest(SHIPPED_CHECKPOINT), "other": digest(base)}
    record = {"commands": COMMANDS} | ({"base_sha256": digests[named]} if named in digests else {})
    path = tmp_path / "row-0.json"
    path.write_text(json.dumps(record))
    assert is_recorded(path, COMMANDS, base if given else None) == valid
    assert not is_recorded(path, {**COMMANDS, "train": {"lr": 1}}, base if given else None)
    assert not is_recorded(tmp_path / "none.json", COMMANDS, None)


def test_another_base_has_commands_a_work_folder_and_a_cache_of_its_own(base, tmp_path, capsys):
    from rows import FULL
    from run import Study

    own = Study(tmp_path / "data", tmp_path / "work", dry_run=True, records=tmp_path / "records")
    own.run(FULL, 0)
    shown = capsys.readouterr().out
    assert "--checkpoint" not in shown
    assert str(tmp_path / "work" / "stable-0") in shown

    other = Study(tmp_path / "data", tmp_path / "work", dry_run=True, checkpoint=base, records=tmp_path / "records")
    other.run(FULL, 0)
    shown = capsys.readouterr().out
    assert shown.count(f"--checkpoint {base}") == 3  # train, and evaluate twice
    assert shown.count(str(tmp_path / "work" / f"base-{digest(base)[:12]}")) >= 4
    assert not (tmp_path / "records").exists()


def test_rows_on_the_same_pictures_share_their_files_and_the_order_is_that_of_their_value():
    from on_gpu import turns

    found = turns(None)
    assert [turn.name for turn in found[:3]] == ["sam_lite-0", "stable-0", "stable_long-0"]
    by_name = {turn.name: turn for turn in found}
    assert len(by_name) == len(found) > 15
    shared = {name: by_name[name].shared for name in ("sam_lite-0", "stable-0", "dt-0", "stable-1", "pt_220-0")}
    assert not shared["sam_lite-0"]
    assert shared["stable-0"] == shared["dt-0"]
    assert len(shared["stable-0"] & shared["stable-1"]) == 1  # pictures, not occlusions
    assert not shared["stable-0"] & shared["pt_220-0"]
    assert [turn.name for turn in turns("stable,dsp")] == ["stable-0", "dsp-0", "stable-1", "stable-2"]
    with pytest.raises(ValueError, match=r"rows: expected some of .*, got \['cake'\]"):
        turns("dt,cake")
