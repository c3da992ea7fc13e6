"""What the two compiled libraries are made of: compilers, flags, sources, architectures.

torch is found, but never imported: that takes longer than a build in which nothing has changed.
"""

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ninja_build import BuildSkippedError, Library, sources

# 10.0 has PTX, too: of what it ships, nothing else runs on 11.0.
DEFAULT_CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0+PTX")
STABLE_ABI_DEFINES = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# -Xptxas -v makes the assembler report what each kernel needs: bench/cuda_compile.py reads it.
CUDA_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", "-DUSE_CUDA", *STABLE_ABI_DEFINES]
OPTIMISED = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
X86_INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class Torch(NamedTuple):
    """The torch to build against."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def includes(self) -> list[str]:
        return ["-isystem", str(self.folder / "include"), "-Icsrc"]


def find_torch() -> Torch:
    specification = find_spec("torch")
    if specification is None or specification.origin is None:
        raise BuildSkippedError("torch was not found while building")
    folder = Path(specification.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    return Torch(folder, facts["__version__"], facts["cuda"])


def host_compiler() -> list[str]:
    """Command of the C++ compiler: $CXX, else Python's own, else the usual names."""
    if os.name != "posix":
        raise BuildSkippedError("the compiled libraries are for Linux and macOS")
    for command in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise BuildSkippedError("no C++ compiler was found (looked at $CXX, c++, g++, clang++)")


def cuda_compiler(torch: Torch) -> tuple[str, str]:
    """Path and version of an nvcc that fits torch."""
    if torch.cuda is None:
        raise BuildSkippedError(f"torch {torch.version} was built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [str(Path(home, "bin"))] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise BuildSkippedError(f"nvcc was not found in {'$CUDA_HOME/bin' if home else '$PATH or /usr/local/cuda/bin'}")
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))[1]
    if version.split(".")[0] != torch.cuda.split(".")[0]:
        raise BuildSkippedError(f"nvcc {version} does not fit torch's CUDA {torch.cuda}: major versions differ")
    return nvcc, version


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_architectures(nvcc: str) -> list[str]:
    """Entries such as "9.0" and "10.0+PTX". The default ships PTX of the newest, for GPUs yet to come."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if requested:
        return requested.replace(" ", ";").strip(";").split(";")
    listing = output_of(nvcc, "--list-gpu-arch").split()
    versions = [architecture.removesuffix("+PTX") for architecture in DEFAULT_CUDA_ARCHITECTURES]
    known = [f"compute_{version.replace('.', '')}" in listing for version in versions]
    architectures = [a for a, is_known in zip(DEFAULT_CUDA_ARCHITECTURES, known, strict=True) if is_known]
    return [*architectures[:-1], architectures[-1].removesuffix("+PTX") + "+PTX"]


def gencode_flags(architectures: Sequence[str]) -> list[str]:
    flags = []
    for entry in architectures:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildSkippedError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got {entry!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cpu_library() -> Library:
    compiler, torch = host_compiler(), find_torch()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants = X86_INSTRUCTION_SETS if is_x86 else {"baseline": []}
    command = [*compiler, *OPTIMISED, *STABLE_ABI_DEFINES, *torch.includes]
    has_variants = [f"-DSTABLE_SAM_HAS_{name.upper()}" for name in variants]
    objects = {}
    for source in sources("csrc/cpu/*.cpp"):
        if source.name != "kernels.cpp":
            objects[f"cpu/{source.name}.o"] = str(source), [*command, *has_variants]
            continue
        for name, flags in variants.items():
            own = [*flags, f"-DSTABLE_SAM_INSTRUCTION_SET={name}"]
            objects[f"cpu/{source.name}.{name}.o"] = str(source), [*command, *own]
    if sys.platform == "darwin":
        linker, libraries = [*compiler, "-dynamiclib"], ["-undefined", "dynamic_lookup"]
    else:
        linker, libraries = [*compiler, "-shared"], [f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
    facts = {"built": True, "torch": torch.version, "instruction_sets": list(variants)}
    return Library("cpu", objects, linker, libraries, [output_of(*compiler, "--version"), torch.version], facts)


def cuda_library(architectures: Sequence[str] | None = None) -> Library:
    """For the architectures asked for in the environment where none are given."""
    torch = find_torch()
    nvcc, version = cuda_compiler(torch)
    host = host_compiler()[0]
    architectures = list(architectures or cuda_architectures(nvcc))
    warnings = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    command = [nvcc, "-ccbin", host, *CUDA_FLAGS, *gencode_flags(architectures), *warnings, *torch.includes]
    folder = "-".join(["cuda", *architectures])  # those of other architectures stay beside it
    objects = {f"{folder}/{path.name}.o": (str(path), command) for path in sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp")}
    if not objects:
        raise BuildSkippedError("this source tree has no CUDA sources")
    linker = [nvcc, "-ccbin", host, "-shared", "-cudart", "shared"]
    libraries = [f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    versions = [output_of(nvcc, "--version"), output_of(host, "--version"), torch.version]
    facts = {"built": True, "torch": torch.version, "cuda": version, "architectures": architectures}
    return Library(folder, objects, linker, libraries, versions, facts)
