"""Compiles the CUDA sources for given architectures without a GPU, and says what each kernel needs there.

The flags are the build's. `compile_sources` makes a cubin a source and architecture, so that one that fails hides no
other; `built_objects` gives the objects that the build makes and keeps.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build_tools"))
from libraries import CUDA_FLAGS, DEFAULT_CUDA_ARCHITECTURES, cuda_library, find_torch
from ninja_build import ROOT, build, objects_folder

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = [f"sm_{name.removesuffix('+PTX').replace('.', '')}" for name in DEFAULT_CUDA_ARCHITECTURES]
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
    flags = [*CUDA_FLAGS, *find_torch().includes]

    def compile_one(job: tuple[Path, str]) -> list[Compiled]:
        source, architecture = job
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        command = [nvcc, *flags, "-cubin", f"-arch={architecture}", "-o", str(cubin.absolute()), str(source.absolute())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0:
            return [Compiled(source.name, architecture, "", error=(done.stderr or done.stdout).strip())]
        return parse_report(done.stderr, source.name, cubin)

    jobs = [(source, architecture) for source in (sources or SOURCES) for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [kernel for kernels in pool.map(compile_one, jobs) for kernel in kernels]


def built_objects() -> dict[str, tuple[Path, str]]:
    """Source -> the object that the build makes of it for all architectures, and the assembler's report.

    What the last build made of these very sources is taken as it is; the rest is compiled now, and kept for the next.

    Raises:
        ninja_build.BuildSkippedError: a source does not compile, or there is no nvcc.
    """
    library, folder = cuda_library(DEFAULT_CUDA_ARCHITECTURES), objects_folder()
    build(library)
    sources = {name: source for name, (source, _) in library.objects.items() if source.endswith(".cu")}
    return {
        Path(source).name: (folder / name, folder.joinpath(f"{name}.log").read_text())
        for name, source in sources.items()
    }


def parse_report(report: str, source: str, cubin: Path | None = None) -> list[Compiled]:
    """What ``ptxas -v`` says of each kernel and architecture."""
    kernels = []
    for entry in re.split(r"Compiling entry function ", report)[1:]:

        def found(pattern: str, entry: str = entry) -> tuple[str, ...]:
            match = re.search(pattern, entry)
            if match is None:
                raise ValueError(f"ptxas -v: expected {pattern!r}, got {entry!r}")
            return match.groups()

        name, architecture = found(r"^'(\S+)' for '(\w+)'")
        stack, *spills = found(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
        (registers,) = found(r"Used (\d+) registers")
        shared = re.search(r"(\d+) bytes smem", entry)
        kernels.append(
            Compiled(
                source,
                architecture,
                demangled(name),
                registers=int(registers),
                stack_bytes=int(stack),
                spill_bytes=sum(map(int, spills)),
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
