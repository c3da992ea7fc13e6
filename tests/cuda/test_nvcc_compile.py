"""Every .cu compiles for every architecture we ship, without spills, with 16-byte accesses; no GPU is needed.

The resource report is kept in tests/cuda/kernel_resources.json. After a deliberate change of a kernel write it anew:
    KEEP_KERNEL_RESOURCES=1 pytest tests/cuda/test_nvcc_compile.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host_kernels import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import cuda_compile
from cuda_compile import ARCHITECTURES, SOURCES, Compiled

RECORD = Path(__file__).parent / "kernel_resources.json"
# Registers a thread may use so that a multiprocessor holds the blocks that the kernel is written for.
REGISTER_LIMIT = {"deformable_sample_kernel": 64, "deformable_sample_backward_kernel": 80}

Resources = dict[str, dict[str, dict[str, int]]]  # architecture -> kernel -> figure

pytestmark = pytest.mark.skipif(cuda_compile.find_nvcc() is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def objects() -> dict[str, tuple[Path, str]]:
    """Object file and assembler report of each source: those of the installed build where they are current."""
    return cuda_compile.built_objects()


@pytest.fixture(scope="module")
def resources(objects: dict[str, tuple[Path, str]]) -> Resources:
    by_architecture: Resources = {architecture: {} for architecture in ARCHITECTURES}
    for source, (_, report) in objects.items():
        for kernel in cuda_compile.parse_report(report, source):
            figures = {"registers": kernel.registers, "stack": kernel.stack_bytes, "spills": kernel.spill_bytes}
            by_architecture[kernel.architecture][kernel.kernel] = figures
    return by_architecture


def test_there_are_sources() -> None:
    assert {"deformable_sample.cu", "deformable_sample_backward.cu"} <= {source.name for source in SOURCES}
    assert ARCHITECTURES == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def test_no_source_has_a_warning(objects: dict[str, tuple[Path, str]]) -> None:
    assert set(objects) == {source.name for source in SOURCES}
    assert not [line for _, report in objects.values() for line in report.splitlines() if "warning" in line]


def test_every_kernel_is_there_for_every_architecture(resources: Resources) -> None:
    names = set(resources["sm_90"])
    assert {name.split("<")[0] for name in names} >= set(REGISTER_LIMIT)
    for architecture in ARCHITECTURES:
        assert set(resources[architecture]) == names, architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_uses_local_memory(resources: Resources, architecture: str) -> None:
    wasteful = {name: r for name, r in resources[architecture].items() if r["stack"] or r["spills"]}
    assert not wasteful


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_leave_room_for_the_planned_blocks(resources: Resources, architecture: str) -> None:
    for name, figures in resources[architecture].items():
        assert figures["registers"] <= REGISTER_LIMIT.get(name.split("<")[0], 128), name


def test_resources_are_those_on_record(resources: Resources) -> None:
    """With the compiler of the record. Another compiler's figures may differ; the limits above hold for all."""
    banner = subprocess.run([cuda_compile.find_nvcc(), "--version"], capture_output=True, text=True).stdout
    compiler = re.search(r"V[\d.]+", banner)[0]
    if os.environ.get("KEEP_KERNEL_RESOURCES"):
        RECORD.write_text(json.dumps({"nvcc": compiler, "kernels": resources}, indent=1, sort_keys=True) + "\n")
    record = json.loads(RECORD.read_text())
    if record["nvcc"] != compiler:
        pytest.skip(f"the record was made by nvcc {record['nvcc']}, this is {compiler}")
    assert resources == record["kernels"]


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one inside Triton's package."""
    toolkit = shutil.which("cuobjdump")
    carried = Path(sys.prefix).glob("lib/python*/site-packages/triton/backends/nvidia/bin/cuobjdump")
    return toolkit or next((str(path) for path in carried), None)


def functions_of(path: Path, architecture: str) -> dict[str, str]:
    """Kernel -> its instructions."""
    listing = subprocess.run(
        [disassembler(), "--dump-sass", "--gpu-architecture", architecture, path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    return {cuda_compile.demangled(function.split("\n", 1)[0].strip()): function for function in functions}


@pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")
@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_vector_kernels_load_and_store_16_bytes(objects: dict[str, tuple[Path, str]], source: str) -> None:
    functions = functions_of(objects[source][0], "sm_90")
    assert functions
    for name, function in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name} touches local memory"
        width = re.search(r"<\w+,(\d+),", name)
        if width is None or width[1] == "1":
            continue
        loads = len(re.findall(r"\bLDG\.E[.\w]*\.128", function))
        stores = len(re.findall(r"\bSTG\.E[.\w]*\.128", function))
        # Four taps at least, and one store a result.
        assert loads >= 4 and stores >= 1, f"{name}: {loads} loads and {stores} stores of 16 bytes"


@pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_forward_waits_for_all_its_loads_at_once(objects: dict[str, tuple[Path, str]], architecture: str) -> None:
    """No arithmetic on what was loaded stands between the taps and the identity."""
    for name, function in functions_of(objects["deformable_sample.cu"][0], architecture).items():
        if ",1," in name:
            continue
        loads = [match.start() for match in re.finditer(r"\bLDG\.E[.\w]*\.128", function)]
        multiplications = len(re.findall(r"\bFFMA\b", function[loads[0] : loads[-1]]))
        assert len(loads) >= 6 and multiplications < 8, f"{name}: {multiplications} between {len(loads)} loads"


def by_kernel(compiled: list[Compiled]) -> dict[tuple[str, str], Compiled]:
    return {(kernel.source, kernel.architecture): kernel for kernel in compiled}


def test_one_source_that_fails_hides_no_other(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.cu", tmp_path / "bad.cu"
    good.write_text(
        "__global__ void keep(float* x) { __shared__ float y[8]; y[threadIdx.x] = *x; __syncthreads(); *x = y[1]; }"
    )
    bad.write_text("__global__ void broken(float* x) { *x = y; }")
    found = by_kernel(cuda_compile.compile_sources(["sm_90", "sm_120"], tmp_path, [good, bad]))
    for architecture in ("sm_90", "sm_120"):
        kept, broken = found["good.cu", architecture], found["bad.cu", architecture]
        assert kept.error is None and kept.registers > 0 and kept.shared_bytes == 32
        assert kept.cubin is not None and kept.cubin.is_file()
        assert broken.error is not None and 'identifier "y" is undefined' in broken.error
