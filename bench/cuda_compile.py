"""Compiles the CUDA sources for given architectures without a GPU, and says what each kernel needs there.

As in setup.py, only device code: a cubin a source and architecture, so that one that fails hides no other.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
# -Xptxas -v makes the assembler report what each kernel needs.
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", "-DUSE_CUDA"]
FLAGS += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# What a launch asks for beside a kernel's own shared memory, at most: what a block gets without asking for more.
MOST_DYNAMIC_SHARED_BYTES = 48 * 1024


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture; where its source does not compile, ``kernel`` is empty and ``error`` says why.

    ``shared_bytes`` is the kernel's own; a launch may add up to `MOST_DYNAMIC_SHARED_BYTES`.
    """

    source: str
    architecture: str
    kernel: str
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    error: str | None = None
    cubin: Path | None = None


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compile_sources(
    architectures: Sequence[str], folder: Path, sources: Sequence[Path] | None = None
) -> list[Compiled]:
    """Every kernel of ``sources`` (all of csrc/cuda where None) for every architecture, in this order.

    Args:
        architectures: such as ``sm_90``.
        folder: where the cubins go, named ``source.architecture.cubin``.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found in $PATH or /usr/local/cuda/bin")
    include = Path(torch.__file__).parent / "include"

    def compile_one(job: tuple[Path, str]) -> list[Compiled]:
        source, architecture = job
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        command = [nvcc, *FLAGS, "-cubin", f"-arch={architecture}", "-isystem", str(include), f"-I{ROOT / 'csrc'}"]
        done = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            return [Compiled(source.name, architecture, "", error=(done.stderr or done.stdout).strip())]
        return parse_report(done.stderr, source.name, cubin)

    jobs = [(source, architecture) for source in (sources or SOURCES) for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [kernel for kernels in pool.map(compile_one, jobs) for kernel in kernels]


def parse_report(report: str, source: str, cubin: Path | None = None) -> list[Compiled]:
    """What ``ptxas -v`` says of each kernel and architecture."""
    kernels = []
    for entry in re.split(r"Compiling entry function ", report)[1:]:
        name, architecture = re.match(r"'(\S+)' for '(\w+)'", entry).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        shared = re.search(r"(\d+) bytes smem", entry)
        kernels.append(
            Compiled(
                source,
                architecture,
                demangled(name),
                registers=int(re.search(r"Used (\d+) registers", entry)[1]),
                stack_bytes=int(stack),
                spill_bytes=int(stores) + int(loads),
                shared_bytes=int(shared[1]) if shared else 0,
                cubin=cubin,
            )
        )
    return kernels


def demangled(name: str) -> str:
    """``deformable_sample_kernel<half,8,false>`` of a mangled kernel name; other names stay as they are."""
    match = re.fullmatch(r"_ZN10stable_sam(\d+)(.*)", name)
    if match is None:
        return name
    function, arguments = match[2][: int(match[1])], match[2][int(match[1]) :]
    scalars = {"13__nv_bfloat16": "bfloat16", "6__half": "half", "f": "float"}
    template = re.match(rf"I({'|'.join(scalars)})(.*?)EEv", arguments)
    if template is None:
        return name
    parts = [scalars[template[1]]]
    for kind, value in re.findall(r"L([ib])(\d+)E?", template[2]):
        parts.append(value if kind == "i" else str(bool(int(value))).lower())
    return f"{function}<{','.join(parts)}>"
