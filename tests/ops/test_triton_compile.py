"""Every Triton kernel compiled for real GPUs, without one: registers, spills and the width of memory accesses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "triton_compile.py"
RECORDS = SCRIPT.parent / "results" / "compile"
KERNELS = {"forward_kernel", "locations_kernel", "gather_kernel", "pixels_kernel", "identity_sum_kernel"}
HEAD_KERNELS = {f"offset_head_{name}" for name in ("kernel", "hidden_kernel", "features_kernel", "taps_kernel")}
ATTENTION_WITHOUT_SPILLS = {f"attention, bfloat16, {rows} rows" for rows in (72, 160)}
HEAD_VARIANTS = ["offset head, bfloat16", "offset head, float32"]
TARGETS = {
    "90": ["bfloat16", "float32", "bfloat16, amplitude per channel", "float32, 33 channels"],
    "80": ["bfloat16", "float32"],
}


def compile_for(target: str, variants: list[str], output: Path) -> list[dict]:
    """In another process: in this one Triton may be interpreting."""
    options = ["--targets", target, "--variants", *variants, "--output", str(output)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())["kernels"]


@pytest.fixture(scope="module", params=TARGETS, ids="sm_{}".format)
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return compile_for(request.param, TARGETS[request.param], tmp_path_factory.mktemp("compile") / "triton.json")


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


def test_the_offset_head_compiles_without_spills_and_reads_16_bytes_at_a_time(tmp_path: Path) -> None:
    record = compile_for("90", HEAD_VARIANTS, tmp_path / "triton.json")
    for variant in HEAD_VARIANTS:
        assert {facts["kernel"] for facts in record if facts["variant"] == variant} == HEAD_KERNELS
    for facts in record:
        assert facts["spills"] == 0 and facts["stack_bytes"] == 0, facts
        # The sums of 25 taps leave registers for 4 channels of a thread.
        width = "64" if facts["kernel"] == "offset_head_taps_kernel" and "bfloat16" in facts["variant"] else "128"
        assert facts["loads"][width] >= 4, facts


def test_only_the_attention_spills_in_the_record() -> None:
    """On every target; and with the tile of 72 rows and more, on sm_90, not even that. Records of other versions of
    Triton are files of their own."""
    attention = json.loads((RECORDS / "triton_attention.json").read_text())["kernels"]
    for facts in attention:
        if facts["target"] == "sm_90" and facts["variant"] in ATTENTION_WITHOUT_SPILLS:
            assert facts["spills"] == 0 and facts["stack_bytes"] == 0, facts
    assert {facts["variant"] for facts in attention} >= ATTENTION_WITHOUT_SPILLS
    names = ("triton.json", "triton_offset_head.json")
    record = [facts for name in names for facts in json.loads((RECORDS / name).read_text())["kernels"]]
    assert {facts["target"] for facts in record} == {f"sm_{target}" for target in (80, 86, 89, 90, 100)}
    assert {facts["kernel"] for facts in record} >= KERNELS | HEAD_KERNELS
    for facts in record:
        assert facts["spills"] == 0 and facts["stack_bytes"] == 0, facts
