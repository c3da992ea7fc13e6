"""``stable-sam doctor`` tells the truth about this machine."""

import json

import torch
from typer.testing import CliRunner

from stable_sam_cuda import backends
from stable_sam_cuda.cli import app
from stable_sam_cuda.modules.attention import choose_path


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
    assert (record["auto"]["cuda"] is None) == (not torch.cuda.is_available())
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


def test_version_and_help() -> None:
    assert run("--version").startswith("stable-sam 0.")
    text = run("--help")
    assert "segment" in text and "doctor" in text
    assert "X0 Y0 X1 Y1" in run("segment", "--help")
