"""``stable-sam doctor`` tells the truth about this machine."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from stable_sam_cuda import backends
from stable_sam_cuda.cli import app
from stable_sam_cuda.modules.attention import choose_path
from stable_sam_cuda.ops import backends as installed
from stable_sam_cuda.ops import libraries


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_agrees_with_the_backends() -> None:
    record = json.loads(run("doctor", "--json"))
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    available = {member.value for member in backends.available()}
    assert {name for name, state in record["backends"].items() if state["available"]} == available
    for name, state in record["backends"].items():
        assert state["reason"] == backends.why_unavailable(name)
        assert state["available"] or state["reason"]
    assert record["auto"]["cpu"] == backends.choose("auto", torch.device("cpu"), torch.float32).value
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert list(record["auto"]) == list(record["attention"]) == ["cpu", *(gpus or ["cuda"])]
    assert gpus or record["auto"]["cuda"] is None
    assert record["attention"]["cpu"] == {
        use: choose_path("auto", torch.device("cpu"), torch.float32, gradients=gradients).value
        for use, gradients in {"inference": False, "training": True}.items()
    }
    assert len(record["cuda_devices"]) == torch.cuda.device_count()
    assert set(record["weights"]) == {"sam_lite", "vit_b", "vit_l", "vit_h"}
    assert set(record["build"]["libraries"]) == {"_ops_cpu", "_ops_cuda"}


def test_tables_name_everything() -> None:
    text = run("doctor")
    for word in (
        "torch",
        "nvcc",
        "c++",
        "_ops_cpu",
        "_ops_cuda",
        "reference",
        "auto on cpu",
        "attention on cpu",
        "sam_lite",
        "vit_h",
    ):
        assert word in text


def test_each_gpu_has_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Turing card beside a Hopper one, and a library for the second alone."""
    cards = [
        SimpleNamespace(name="T4", major=7, minor=5, total_memory=2**34),
        SimpleNamespace(name="H100", major=9, minor=0, total_memory=2**36),
    ]

    def properties(device: torch.device | int) -> SimpleNamespace:
        return cards[device if isinstance(device, int) else device.index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(libraries, "ARCHITECTURES", (libraries.Architecture.parse("9.0"),))
    monkeypatch.setattr(installed, "MISSING", dict.fromkeys(installed.MISSING))
    monkeypatch.setattr(libraries, "triton_interprets", lambda: False)
    backends.forget_choices()
    try:
        record, text = json.loads(run("doctor", "--json")), " ".join(run("doctor").split())
    finally:
        backends.forget_choices()
    reasons = {
        "cuda": "the device has compute capability 7.5, the library was compiled for 9.0",
        "triton": "the device has compute capability 7.5, Triton asks for 8.0",
    }
    there = {"available": True, "reason": None}
    for name, reason in reasons.items():
        first = {"available": False, "reason": reason}
        assert record["backends"][name] == there | {"devices": {"cuda:0": first, "cuda:1": there}}
        assert reason in text
    assert record["auto"] == {"cpu": "cpu", "cuda:0": "reference", "cuda:1": "cuda"}
    assert record["attention"]["cuda:0"] == {"inference": "sampled", "training": "sampled"}
    assert "auto on cuda:0 reference" in text and "auto on cuda:1 cuda" in text


def test_version_and_help() -> None:
    assert run("--version").startswith("stable-sam 0.")
    text = run("--help")
    assert "segment" in text and "doctor" in text
    assert "X0 Y0 X1 Y1" in run("segment", "--help")
