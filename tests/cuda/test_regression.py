"""The comparison of a record with the last one of the same GPU."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def figure(operation: str, provider: str, median: float, mode: str = "forward") -> dict[str, object]:
    facts = {"operation": operation, "provider": provider, "dtype": "bfloat16", "B": 64, "mode": mode, "cache": "cold"}
    return facts | {"microseconds": {"median": median, "p20": median, "p80": median, "runs": 9}}


@pytest.fixture
def old() -> dict:
    sampler = [figure("deformable_sample", "cuda", 100.0), figure("deformable_sample", "eager", 900.0)]
    return {
        "device": "a GPU",
        "dry_run": False,
        "commit": "1",
        "sampler": {"records": sampler},
        "attention": {"records": [figure("layer", "fused", 200.0), {"provider": "fused", "skipped": "out of time"}]},
    }


def compare(old: dict, new: dict, folder: Path) -> subprocess.CompletedProcess[str]:
    for name, record in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text(json.dumps(record))
    words = [sys.executable, BENCH / "regression.py", folder / "old.json", folder / "new.json"]
    return subprocess.run(words, capture_output=True, text=True)


def test_4_percent_is_noise_and_what_others_do_is_theirs(old: dict, tmp_path: Path) -> None:
    new = copy.deepcopy(old)
    new["sampler"]["records"] = [figure("deformable_sample", "cuda", 104.0), figure("deformable_sample", "eager", 2e3)]
    new["attention"]["records"].append(figure("attention", "fused", 50.0))  # new: nothing to compare it with
    predicted = [figure("predict", "fused", 1e4) | {"host_work": True}]  # of another host
    old["decoder"], new["decoder"] = {"records": predicted}, {"records": [figure("predict", "fused", 2e4)]}
    new["decoder"]["records"][0]["host_work"] = True
    done = compare(old, new, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none of 2 common figures is slower" in done.stdout


def test_the_decoder_is_compared_too(old: dict, tmp_path: Path) -> None:
    new = copy.deepcopy(old)
    for record, median in ((old, 900.0), (new, 1000.0)):
        record["decoder"] = {"records": [figure("decoder", "fused", median)]}
    done = compare(old, new, tmp_path)
    assert done.returncode == 1 and "decoder, fused, bfloat16, 64, forward, cold" in done.stdout


def test_6_percent_is_named(old: dict, tmp_path: Path) -> None:
    new = copy.deepcopy(old)
    new["attention"]["records"][0]["microseconds"]["median"] = 212.0
    done = compare(old, new, tmp_path)
    assert done.returncode == 1
    assert done.stdout.strip() == "layer, fused, bfloat16, 64, forward, cold: 200.0 -> 212.0 us, 1.06 x"


def test_records_of_two_devices_are_not_compared(old: dict, tmp_path: Path) -> None:
    done = compare(old, old | {"device": "another"}, tmp_path)
    assert done.returncode == 2 and "different devices" in done.stderr


def test_the_last_record_is_a_real_one_of_the_device(
    old: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from regression import last_record

    records = {
        "2026-01-01-1": old,
        "2026-01-02-2": old | {"commit": "2"},
        "2026-01-03-3": old | {"commit": "3", "dry_run": True},
        "2026-01-04-4": old | {"commit": "4", "device": "another"},
        "2026-01-05-5": old | {"commit": "5"},
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert last_record(tmp_path, "a GPU", but="5") == tmp_path / "2026-01-02-2.json"
    assert last_record(tmp_path / "none", "a GPU", but="5") is None
