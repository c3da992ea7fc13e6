"""The script that waits for a GPU, rehearsed without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rehearse(folder: Path, *words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    environment = os.environ | {"OUT": str(folder), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | variables
    command = [ROOT / "bench" / "on_gpu.sh", "--dry-run", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (record,) = folder.glob("*.json")
    return done, json.loads(record.read_text())


def measured(benchmark: dict) -> set[tuple[str, str, str]]:
    """Operation, provider and mode of every figure."""
    return {(r["operation"], r["provider"], r["mode"]) for r in benchmark["records"] if "microseconds" in r}


@pytest.mark.slow
def test_every_part_runs_or_says_why_not(tmp_path: Path) -> None:
    done, record = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = {name: part["status"] for name, part in record["parts"].items()}
    ran = dict.fromkeys(("build", "tests", "attention_tests", "attention", "sampler", "decoder", "fuzz"), "passed")
    assert statuses == ran | {"sanitizer": "left out", "profile": "left out"}
    for name in ("sanitizer", "profile"):
        for command in record["parts"][name]["commands"].values():
            assert command["reason"] == "needs a CUDA device"
    assert {("deformable_sample", p, m) for p in ("cpu", "eager") for m in ("forward", "backward")} <= measured(
        record["sampler"]
    )
    layers = {("layer", p, m) for p in ("fused", "eager") for m in ("forward", "backward")}
    assert layers | {("plain", p, "forward") for p in ("eager", "sdpa")} <= measured(record["attention"])
    decoders = {("decoder", p, "forward") for p in ("fused", "sam", "sam, shared")}
    predictors = {("set_image + predict", p, "forward") for p in ("fused", "sam")}
    trainings = {("training_step", p, "step") for p in ("fused", "eager", "reference")}
    assert decoders | predictors | trainings <= measured(record["decoder"])
    for name in ("sampler", "attention", "decoder"):
        assert record[name]["copy_gb_per_s"] > 0 and record[name]["matmul_tflop_per_s"] > 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".log"}


def test_without_segment_anything_the_decoder_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "segment_anything.py").write_text("raise ImportError('not on this machine')")
    done, record = rehearse(tmp_path, "--parts", "decoder", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (command,) = record["parts"]["decoder"]["commands"].values()
    assert command["status"] == "left out"
    assert command["reason"] == "needs segment_anything: ImportError: not on this machine"
    assert "decoder" not in record


def test_time_that_is_up_is_said(tmp_path: Path) -> None:
    done, record = rehearse(tmp_path, "--seconds", "1", "--parts", "fuzz")
    assert done.returncode == 1
    assert record["parts"]["fuzz"]["status"] == "not begun: out of time"


def test_without_a_gpu_and_without_a_rehearsal_nothing_is_claimed(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "bench" / "on_gpu.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
