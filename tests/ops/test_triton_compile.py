"""Every Triton kernel compiled for real GPUs, without one: registers, spills and the width of memory accesses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "triton_compile.py"
KERNELS = {"forward_kernel", "locations_kernel", "gather_kernel", "pixels_kernel", "identity_sum_kernel"}
TARGETS = {
    "90": ["bfloat16", "float32", "bfloat16, amplitude per channel", "float32, 33 channels"],
    "80": ["bfloat16", "float32"],
}


@pytest.fixture(scope="module", params=TARGETS, ids="sm_{}".format)
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Compiled in another process: in this one Triton may be interpreting."""
    output = tmp_path_factory.mktemp("compile") / "triton.json"
    options = ["--targets", request.param, "--variants", *TARGETS[request.param], "--output", str(output)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())["kernels"]


def test_every_kernel_compiles(record: list[dict]) -> None:
    for variant in {facts["variant"] for facts in record}:
        compiled = {facts["kernel"] for facts in record if facts["variant"] == variant}
        assert compiled >= KERNELS - {"identity_sum_kernel"}
    assert {facts["kernel"] for facts in record} == KERNELS


def test_nothing_spills(record: list[dict]) -> None:
    for facts in record:
        assert facts["spills"] == 0 and facts["stack_bytes"] == 0, facts


def test_channels_move_16_bytes_at_a_time(record: list[dict]) -> None:
    """Where the channel count allows it: all loads and stores of features, identity, output and their gradients."""
    for facts in record:
        if facts["kernel"] == "locations_kernel":
            continue
        if "33 channels" in facts["variant"] and facts["kernel"] != "identity_sum_kernel":
            assert "128" not in facts["loads"], facts
            continue
        assert facts["loads"]["128"] >= 4, facts
        assert facts["stores"]["128"] >= 1, facts
