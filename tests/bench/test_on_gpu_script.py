"""The script that waits for a GPU, rehearsed without one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "on_gpu.sh"
TIMED = ("deformable_sample", "deformable_attention", "offset_head", "decoder", "training_step", "predictor")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def rehearse(folder: Path, *words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    own = {"OUT": str(folder), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "STABLE_SAM_COMMIT": "rehearsed"}
    done = subprocess.run([SCRIPT, *words], env=os.environ | own | variables, capture_output=True, text=True)
    records = list(folder.glob("*.json"))
    return done, json.loads(records[0].read_text()) if records else {}


def statuses(record: dict) -> dict[str, str]:
    return {name: part["status"] for name, part in record["parts"].items()}


@pytest.mark.slow
def test_every_part_of_both_calls_runs_or_says_why_not(tmp_path: Path) -> None:
    import targets

    first, record = rehearse(tmp_path, "--dry-run")
    assert first.returncode == 0, first.stdout + first.stderr
    ran = dict.fromkeys(("launches", "kernels", "sanitizer", *TIMED), "passed")
    if list(ROOT.glob("tests/**/test_*end_to_end*.py")):
        ran["end_to_end"] = "passed"
    assert statuses(record) == {"build": "left out", "end_to_end": "left out"} | ran
    second, record = rehearse(tmp_path, "--dry-run", "--second")
    assert second.returncode == 0, second.stdout + second.stderr
    ran |= {f"more_{name}": "passed" for name in TIMED if name != "predictor"}
    ran["more_training_step"] = "left out"  # on a CPU the first call has measured it all
    left_out = dict.fromkeys(("build", "plans", "plan_times", "profile"), "left out")
    assert statuses(record) == left_out | ran
    checks = record["parts"]["sanitizer"]["commands"]
    assert {name: check["status"] for name, check in checks.items() if name != "fuzz cpu"} == dict.fromkeys(
        [f"{tool} {backend}" for backend in ("cuda", "triton") for tool in TOOLS], "left out"
    )
    assert checks["memcheck cuda"]["end"] == "needs a CUDA device"
    measured = {(one["extra_info"]["operation"], one["extra_info"]["contestant"]) for one in record["benchmarks"]}
    targets_name = {(one.operation, name) for one in (*targets.GPU, *targets.CPU) for name in (one.ours, one.theirs)}
    assert {(operation, name) for operation, name in targets_name if name not in (None, "cuda", "compile")} <= measured
    assert record["machine_info"]["copy_gb_per_s"] > 0 and record["machine_info"]["matmul_tflop_per_s"] > 0
    (summary,) = tmp_path.glob("*.md")
    assert "#### Sampler" in summary.read_text() and "no figure in it means anything" in summary.read_text()
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".json", ".md", ".log"}


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script in this process; it returns its exit code."""
    import gpu_calls

    def main(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_calls.py", "--dry-run", *words])
        monkeypatch.setenv("OUT", str(tmp_path))
        monkeypatch.setenv("STABLE_SAM_COMMIT", "rehearsed")
        return gpu_calls.main()

    return main


def test_a_part_that_passed_for_the_commit_is_not_run_again(
    main, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {"device": "no GPU", "commit": "rehearsed", "dry_run": True, "benchmarks": []}
    before["parts"] = {"offset_head": {"status": "passed", "seconds": 7, "commands": {}}}
    (tmp_path / "2030-01-01-rehearsed.json").write_text(json.dumps(before))
    assert main("--parts", "offset_head") == 0
    assert "offset_head: passed" in capsys.readouterr().out
    assert not list((tmp_path / "state").glob("offset_head*"))


def test_time_that_is_up_is_said(main, tmp_path: Path) -> None:
    assert main("--seconds", "5", "--parts", "kernels") == 1
    (record,) = tmp_path.glob("*.json")
    assert statuses(json.loads(record.read_text())) == {"kernels": "not begun: out of time"}
    (summary,) = tmp_path.glob("*.md")
    assert "| kernels | not begun: out of time |" in summary.read_text()


def test_a_part_that_does_not_exist_is_said(main, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main("--parts", "kernels", "cake")
    assert (
        f"--parts: expected some of build, launches, kernels, end_to_end, sanitizer, {', '.join(TIMED)}, got cake"
        in capsys.readouterr().err
    )


def test_without_a_gpu_and_without_a_rehearsal_nothing_is_claimed(tmp_path: Path) -> None:
    done, _ = rehearse(tmp_path)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_segment_anything_the_models_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_calls

    monkeypatch.setattr(gpu_calls, "find_spec", lambda name: None)
    commands = {part.name: words for part in gpu_calls.first_parts(dry=True) for words in part.commands.values()}
    commands["end_to_end"] = gpu_calls.pytest("tests/cuda/test_end_to_end.py")
    reason = "needs segment_anything, which is not installed"
    left_out = {name for name, words in commands.items() if gpu_calls.why_not(words, dry=True) == reason}
    assert left_out == {"end_to_end", "decoder", "training_step", "predictor"}


MADE_UP = """
import time
import pytest

@pytest.mark.parametrize(("contestant", "host_work"), [("fused", False), ("fused", True), ("eager", False)])
def test_right(benchmark, contestant, host_work):
    benchmark.extra_info.update(operation="decoder", contestant=contestant, host_work=host_work)
    benchmark.pedantic(lambda: None, rounds=3)

@pytest.mark.skip(reason="out of time")
def test_late(benchmark):
    pass

def test_wrong(benchmark):
    assert 1 + 1 == 3, "sums are off"

def test_long(benchmark):
    time.sleep(300)
"""
OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--seconds", type=float)
"""


@pytest.fixture
def run_made_up(tmp_path: Path):
    """Runs a part of made-up benchmarks within some seconds; returns the record."""
    import gpu_calls

    (tmp_path / "conftest.py").write_text(OPTIONS)
    (tmp_path / "test_made_up.py").write_text(MADE_UP)
    words = gpu_calls.pytest("--benchmark-only", "-c", "/dev/null", "--rootdir", str(tmp_path), "-ra", str(tmp_path))

    def run_made_up(seconds: float, *more: str, record: dict | None = None) -> dict:
        record = record or {"parts": {}, "benchmarks": []}
        part = gpu_calls.Part("made_up", seconds, {"pytest": [*words, *more]})
        gpu_calls.run_part(part, tmp_path, seconds, True, record, tmp_path / "all.log")
        return record

    return run_made_up


def test_what_is_interrupted_keeps_its_figures_and_goes_on_behind_them(run_made_up) -> None:
    record = run_made_up(6)
    assert record["parts"]["made_up"]["status"] == "out of time"
    assert len(record["benchmarks"]) == 3
    record = run_made_up(60, "-k", "right or wrong", record=record)
    (facts,) = record["parts"]["made_up"]["commands"].values()
    assert facts["end"].startswith("1 failed, 5 deselected") and len(record["benchmarks"]) == 3


def test_failures_and_what_became_slower_are_named(run_made_up, tmp_path: Path) -> None:
    import gpu_calls

    results = tmp_path / "results"
    results.mkdir()

    def run_after(*medians: float) -> list[str]:
        """Failures beside earlier records of these medians, day by day, of this very commit on the last day."""
        for day, median in enumerate(medians):
            for benchmark in record["benchmarks"]:
                benchmark["stats"]["median"] = median
            facts = {"commit": "new+" if day == 2 else "old", "datetime": f"2030-01-0{day}"}
            (results / f"{9 - day}.json").write_text(json.dumps(record | facts))
        gpu_calls.write_baseline(results, "new", tmp_path / gpu_calls.BASELINE)
        part = run_made_up(60, "--deselect", "test_made_up.py::test_long")["parts"]["made_up"]
        assert part["status"] == "failed with exit code 1"
        return part["commands"]["pytest"]["failures"]

    record = run_made_up(60, "--deselect", "test_made_up.py::test_long")
    (wrong,) = record["parts"]["made_up"]["commands"]["pytest"]["failures"]
    assert wrong.startswith("FAILED") and wrong.endswith("::test_wrong - AssertionError: sums are off")
    late = run_made_up(60, "-k", "right or late")["parts"]["made_up"]
    assert late["status"] == "out of time"
    assert run_after(1e-12, 1e3, 1e-12) == [wrong]
    slower, *others = run_after(1e3, 1e-12, 1e3)
    assert "test_right[fused-False]" in slower and "PercentageRegressionCheck" in slower
    assert others == [wrong]
    assert "assert (1 + 1) == 3" in (tmp_path / "all.log").read_text()


def test_the_profiler_sees_every_kernel_of_ours() -> None:
    import gpu_calls

    sources = [path.read_text() for folder in ("kernels/**/*.py", "csrc/cuda/*.cu*") for path in ROOT.glob(folder)]
    names = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    names |= {name for text in sources for name in re.findall(r"__global__[^;{]*?(\w+)\(const", text)}
    assert len(names) >= 15
    assert {name for name in names if not re.search(gpu_calls.KERNELS.removeprefix("regex:"), name)} == set()


def test_what_was_compiled_goes_along_to_the_next_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_calls

    here, there, out = (tmp_path / name for name in ("here", "there", "out"))
    for folder in (here / "build" / "on_gpu" / "triton" / "ABC", there / "build", out):
        folder.mkdir(parents=True)
    kernel = os.urandom(100_000)
    (here / "build" / "on_gpu" / "triton" / "ABC" / "kernel.cubin").write_bytes(kernel)
    monkeypatch.setattr(gpu_calls, "PACKED_BYTES", 30_000)
    monkeypatch.setattr(gpu_calls, "ROOT", here)
    monkeypatch.setattr(gpu_calls, "STATE", here / "build" / "on_gpu")
    gpu_calls.pack(out)
    assert len(sorted(out.iterdir())) == 4
    assert max(path.stat().st_size for path in out.iterdir()) <= 30_000
    monkeypatch.setattr(gpu_calls, "ROOT", there)
    gpu_calls.unpack(out)
    assert (there / "build" / "on_gpu" / "triton" / "ABC" / "kernel.cubin").read_bytes() == kernel
