"""Every Triton kernel compiled for real GPUs, without one, by the Triton that is installed (bench/compile_matrix.py).

In other processes: in this one Triton may be interpreting.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "compile_matrix.py"
SAMPLER = {"forward_kernel", "locations_kernel", "gather_kernel", "pixels_kernel", "identity_sum_kernel"}
HEAD = {f"offset_head_{name}" for name in ("kernel", "hidden_kernel", "features_kernel", "taps_kernel")}
ATTENTION = {"attention_kernel", "merge_kernel", "attention_tiles_kernel", "attention_rows_kernel"}
# Compiled a second time at most: results of many programs are summed in float32 rather than written as they are. With
# few prompts the map of one is shared among programs, with many their gradients by one image are. And one prompt's
# gradient by the identity is written by a kernel of its own only where prompts share the identity.
TWICE = {"attention_kernel", "gather_kernel", "pixels_kernel"}


def run_matrix(*options: str, kernels: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``kernels``: a folder that holds other kernels than the project's."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    if kernels is not None:
        environment["PYTHONPATH"] = str(kernels)
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, env=environment)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module", params=["80", "90"], ids="sm_{}".format)
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    output = tmp_path_factory.mktemp("matrix") / "matrix.json"
    done = run_matrix("--quick", "--only", request.param, "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"compile matrix: \d+ compiled, 0 failed, 0 over the limit, 0 with spills", last_line(done))
    return json.loads(output.read_text())["kernels"]


def test_every_kernel_compiles(record: list[dict]) -> None:
    assert {kernel["name"] for kernel in record} == SAMPLER | HEAD | ATTENTION


def test_channels_move_16_bytes_at_a_time(record: list[dict]) -> None:
    """Where the channel count allows it: loads and stores of features, identity, output and their gradients."""
    sampler = [kernel for kernel in record if kernel["call"].startswith("sampler")]
    for kernel in sampler:
        if kernel["name"] == "locations_kernel":
            continue
        if "C=33" in kernel["call"]:
            assert kernel["wide_loads"] == 0, kernel
        else:
            assert kernel["wide_loads"] >= 4, kernel
    for name in ("forward_kernel", "gather_kernel", "pixels_kernel"):  # the last, where identity has a gradient
        assert any(kernel["wide_stores"] >= 1 for kernel in sampler if kernel["name"] == name), name


def test_another_number_of_prompts_compiles_nothing_anew() -> None:
    done = run_matrix("--recompiles")
    assert done.returncode == 0, done.stderr
    anew = json.loads(done.stdout)
    assert {name for kernels in anew.values() for name in kernels} == SAMPLER | HEAD | ATTENTION
    for call, kernels in anew.items():
        for name, count in kernels.items():
            assert count <= (name in TWICE), (call, name)


class Fault(NamedTuple):
    """What is done to the kernels, which of them are compiled then, and what is found."""

    file: str
    text: str
    replacement: str
    match: str
    found: str
    architecture: str = "80"


FAULTS = {
    "size_of_1_is_no_tensor": Fault(
        "location.py",
        "tl.cast(size - 1, tl.float32)",
        "(size - 1).to(tl.float32)",
        "^locations_kernel, sampler float32 C=33 1x64 B=1 -1",
        r"FAILED, \w*Error",
    ),
    "product_of_8_columns": Fault(
        "attention/plan.py",
        "plan(64, (4, 4), 8, 1, precision=precision)",
        "plan(64, (2, 4), 8, 1, precision=precision)",
        "^attention_kernel, attention float32 C=33 1x1 B=1 8",
        "FAILED, (a product of 8 columns|.*K >= 16)",  # the second by Triton itself, before 3.8
    ),
    "shared_memory": Fault(
        "attention/plan.py",
        "copies * padded * rows * dtype.itemsize",
        "0 * padded * rows * dtype.itemsize",
        "^attention_tiles_kernel, attention bfloat16 C=256 64x64 B=64 160",
        "of 101376 shared OVER THE LIMIT",
        "86",
    ),
    "warp_groups": Fault(
        "attention/plan.py",
        "_LONG_SIDE = 32",
        "_LONG_SIDE = 64",
        "^attention_kernel, attention bfloat16 C=33 64x1 B=64 72",
        "FAILED, takes warp-group instructions",
        "90",
    ),
    "trap": Fault(
        "attention/tile.py",
        "    return tl.dot(left, right, acc=acc, input_precision=PRECISION)",
        "    return acc",
        "^attention_rows_kernel, attention float32 C=33 1x1 B=1 8",
        "FAILED, compiled to a trap: it loads nothing",
    ),
}


def plant(folder: Path, file: str, text: str, replacement: str) -> Path:
    """The project's kernels with one fault, in ``folder``."""
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "kernels" / file
    source = path.read_text()
    assert source.count(text) == 1
    path.write_text(source.replace(text, replacement))
    return folder


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault: Fault, tmp_path: Path) -> None:
    planted = plant(tmp_path, fault.file, fault.text, fault.replacement)
    selection = [] if " C=256 " in fault.match else ["--quick"]
    done = run_matrix("--only", fault.architecture, "--match", fault.match, *selection, kernels=planted)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(fault.found, done.stdout), done.stdout + done.stderr
    assert not last_line(done).endswith(" 0 failed, 0 over the limit, 0 with spills")


def test_a_matrix_of_nothing_has_failed() -> None:
    done = run_matrix("--quick", "--only", "80", "--match", "no such kernel")
    assert done.returncode == 1 and last_line(done).startswith("compile matrix: 0 compiled, 0 failed")


def test_a_planted_number_that_changes_is_found(tmp_path: Path) -> None:
    done = run_matrix("--recompiles", kernels=plant(tmp_path, "launch.py", '    "prompts",\n', ""))
    anew = json.loads(done.stdout)
    assert any(kernels.get("gather_kernel", 0) > 1 for kernels in anew.values())
