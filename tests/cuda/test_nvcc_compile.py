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
from collections import defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).parent / "kernel_resources.json"
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# As in setup.py; -Xptxas -v makes the assembler report what each kernel needs.
FLAGS = ["-std=c++20", "-O3", "-Xptxas", "-v", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS += ["-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "--threads", "2"]
# Registers a thread may use so that a multiprocessor holds the blocks that the kernel is written for.
REGISTER_LIMIT = {"deformable_sample_kernel": 64, "deformable_sample_backward_kernel": 80}

Resources = dict[str, dict[str, dict[str, int]]]  # architecture -> kernel -> figure

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def demangled(name: str) -> str:
    """``deformable_sample_kernel<half,8,false>`` of a mangled kernel name."""
    words = r"_ZN10stable_sam(\d+)(.*)"
    length, rest = re.fullmatch(words, name).groups()
    function, arguments = rest[: int(length)], rest[int(length) :]
    scalar = {"13__nv_bfloat16": "bfloat16", "6__half": "half", "f": "float"}
    element, values = re.match(r"I(13__nv_bfloat16|6__half|f)(.*?)EEv", arguments).groups()
    parts = [scalar[element]]
    for kind, value in re.findall(r"L([ib])(\d+)E?", values):
        parts.append(value if kind == "i" else str(bool(int(value))).lower())
    return f"{function}<{','.join(parts)}>"


def parse_report(report: str) -> Resources:
    """ptxas -v: one entry a kernel and an architecture."""
    resources: Resources = defaultdict(dict)
    entries = re.split(r"Compiling entry function ", report)[1:]
    for entry in entries:
        name, architecture = re.match(r"'(\S+)' for '(\w+)'", entry).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        registers = re.search(r"Used (\d+) registers", entry)[1]
        resources[architecture][demangled(name)] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
        }
    return dict(resources)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Object file and assembler report of each source."""
    folder = tmp_path_factory.mktemp("nvcc")
    include = Path(torch.__file__).parent / "include"
    built = {}
    for source in SOURCES:
        target = folder / f"{source.stem}.o"
        codes = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
        command = [NVCC, *FLAGS, *codes, "-isystem", include, "-I", ROOT / "csrc", "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        warnings = [line for line in done.stderr.splitlines() if "warning" in line]
        assert not warnings, warnings
        built[source.name] = (target, done.stderr)
    return built


@pytest.fixture(scope="module")
def resources(objects: dict[str, tuple[Path, str]]) -> Resources:
    merged: Resources = {architecture: {} for architecture in ARCHITECTURES}
    for _, report in objects.values():
        for architecture, kernels in parse_report(report).items():
            merged[architecture] |= kernels
    return merged


def test_there_are_sources() -> None:
    assert {"deformable_sample.cu", "deformable_sample_backward.cu"} <= {source.name for source in SOURCES}


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
    compiler = re.search(r"V[\d.]+", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[0]
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


@pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")
@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_vector_kernels_load_and_store_16_bytes(objects: dict[str, tuple[Path, str]], source: str) -> None:
    listing = subprocess.run(
        [disassembler(), "--dump-sass", "--gpu-architecture", "sm_90", objects[source][0]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    assert functions
    for function in functions:
        name = demangled(function.split("\n", 1)[0].strip())
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name} touches local memory"
        width = re.search(r"<\w+,(\d+),", name)
        if width is None or width[1] == "1":
            continue
        loads = len(re.findall(r"\bLDG\.E[.\w]*\.128", function))
        stores = len(re.findall(r"\bSTG\.E[.\w]*\.128", function))
        # Four taps at least, and one store a result.
        assert loads >= 4 and stores >= 1, f"{name}: {loads} loads and {stores} stores of 16 bytes"
