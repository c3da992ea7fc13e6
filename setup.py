"""Builds the compiled operations. Everything that is not compiled is declared in pyproject.toml.

Environment:
    STABLE_SAM_BUILD      auto (default): build what this machine can, record why the rest was skipped;
                          force: fail unless both compiled libraries are built;  none: build nothing.
    TORCH_CUDA_ARCH_LIST  as in PyTorch, e.g. "8.0;9.0+PTX".
    MAX_JOBS              compilers run at a time.
    STABLE_SAM_OBJECTS    folder of the compiled objects, kept between builds: build/objects where it is not set.

Three extension modules come out, all optional at run time:
    _ops_cpu    C++ kernels. Their source is compiled once per instruction set and chosen at run time,
                so a wheel built on one machine runs on others.
    _ops_cuda   CUDA kernels; only where nvcc and a CUDA build of torch of the same major version are.
    _C          build_info(): what was built, with what, and why something was not.
The first two use torch's stable ABI (torch >= 2.11) and know nothing of Python.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

OLDEST_SETUPTOOLS = 77  # of those before, none reads this project's licence
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"setuptools: expected {OLDEST_SETUPTOOLS} or later, got {setuptools.__version__}. Without build isolation, "
        "install what the build needs first: pip install 'setuptools>=77' wheel 'pybind11>=2.12'"
    )

ROOT = Path(__file__).resolve().parent
PACKAGE = "stable_sam_cuda"
BUILD_MODE = os.environ.get("STABLE_SAM_BUILD", "auto")
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


class BuildSkippedError(Exception):
    """A library cannot be built here; the message says why, for `doctor` and for the build log."""


def host_compiler() -> list[str]:
    """Command of the C++ compiler: $CXX, else Python's own, else the usual names."""
    for command in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise BuildSkippedError("no C++ compiler was found (looked at $CXX, c++, g++, clang++)")


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise BuildSkippedError(f"torch could not be imported while building: {error}") from error
    return torch


def cuda_compiler(torch) -> tuple[str, str]:
    """Path and version of an nvcc that fits torch."""
    if torch.version.cuda is None:
        raise BuildSkippedError(f"torch {torch.__version__} was built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [str(Path(home, "bin"))] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise BuildSkippedError(f"nvcc was not found in {'$CUDA_HOME/bin' if home else '$PATH or /usr/local/cuda/bin'}")
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", banner)[1]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise BuildSkippedError(f"nvcc {version} does not fit torch's CUDA {torch.version.cuda}: major versions differ")
    return nvcc, version


def cuda_architectures(nvcc: str) -> list[str]:
    """Entries such as "9.0" and "10.0+PTX". The default ships PTX of the newest, for GPUs yet to come."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if requested:
        return requested.replace(" ", ";").strip(";").split(";")
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    versions = [architecture.removesuffix("+PTX") for architecture in DEFAULT_CUDA_ARCHITECTURES]
    known = [f"compute_{version.replace('.', '')}" in listing for version in versions]
    architectures = [a for a, is_known in zip(DEFAULT_CUDA_ARCHITECTURES, known, strict=True) if is_known]
    return [*architectures[:-1], architectures[-1].removesuffix("+PTX") + "+PTX"]


def gencode_flags(architectures: list[str]) -> list[str]:
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


def run(command: list[str]) -> str:
    """What the command prints to stderr. It runs in the source tree, so that paths and objects are the same in any."""
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise BuildSkippedError(f"{Path(command[0]).name} failed:\n{(done.stderr or done.stdout).strip()[-4000:]}")
    return done.stderr


def job_count() -> int:
    return int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def compile_objects(jobs: list[tuple[str, list[str]]], directory: str, concurrency: tuple[str, ...] = ()) -> list[Path]:
    """Objects of the (source, command) jobs, each with what the compiler said in a ``.log`` beside it.

    An object's name is a digest of all that makes it: the command, the compiler's version, the source, the headers.
    One that is there is not compiled again. ``concurrency`` is added to a command, and no part of what it makes.
    """
    folder = Path(os.environ.get("STABLE_SAM_OBJECTS") or ROOT / "build" / "objects").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    headers = sorted(path for place in ("csrc", f"csrc/{directory}") for path in ROOT.glob(f"{place}/*.*h"))
    compilers = {command[0] for _, command in jobs}
    said = [subprocess.run([name, "--version"], capture_output=True, text=True).stdout for name in sorted(compilers)]
    common = "\n".join([*said, import_torch().__version__, *(f"{path.name}\n{path.read_text()}" for path in headers)])

    def compile_one(job: tuple[str, list[str]]) -> Path:
        source, command = job
        made_from = "\n".join([*command, source, (ROOT / source).read_text(), common])
        target = folder / f"{Path(source).name}.{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.o"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}")
            log = run([*command, *concurrency, "-c", source, "-o", str(unfinished)])
            target.with_suffix(".log").write_text(log)
            unfinished.replace(target)
        return target

    with ThreadPoolExecutor(job_count()) as pool:
        return list(pool.map(compile_one, jobs))


def compile_cuda(nvcc: str, architectures: list[str]) -> list[Path]:
    """The objects of all CUDA sources."""
    warnings = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    command = [nvcc, "-ccbin", host_compiler()[0], *CUDA_FLAGS, *gencode_flags(architectures), *warnings]
    command += torch_includes(import_torch())
    sources = sorted(path for suffix in ("cu", "cpp") for path in ROOT.glob(f"csrc/cuda/*.{suffix}"))
    if not sources:
        raise BuildSkippedError("this source tree has no CUDA sources")
    jobs = [(str(path.relative_to(ROOT)), command) for path in sources]
    return compile_objects(jobs, "cuda", ("--threads", str(job_count())))


class BuildOperations(build_ext):
    """Builds the two operator libraries with plain compiler calls and _C as setuptools would."""

    def run(self) -> None:
        self.record = {"mode": BUILD_MODE, "libraries": {}}
        super().run()

    def build_extension(self, extension: Extension) -> None:
        name = extension.name.rpartition(".")[2]
        if name == "_C":
            return self.build_info_module(extension)
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)
        try:
            facts = {"_ops_cpu": self.build_cpu, "_ops_cuda": self.build_cuda}[name](output)
        except BuildSkippedError as error:
            if BUILD_MODE == "force":
                raise SystemExit(f"STABLE_SAM_BUILD=force: {name} cannot be built: {error}") from error
            print(f"{name} is not built: {error}", flush=True)
            facts = {"built": False, "reason": str(error)}
        self.record["libraries"][name] = facts

    def build_cpu(self, output: Path) -> dict:
        compiler, torch = host_compiler(), import_torch()
        includes = torch_includes(torch)
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        variants = X86_INSTRUCTION_SETS if is_x86 else {"baseline": []}
        jobs = []
        for path in sorted(ROOT.glob("csrc/cpu/*.cpp")):
            source, flags = str(path.relative_to(ROOT)), [*OPTIMISED, *STABLE_ABI_DEFINES, *includes]
            if path.name != "kernels.cpp":
                defines = [f"-DSTABLE_SAM_HAS_{name.upper()}" for name in variants]
                jobs.append((source, [*compiler, *flags, *defines]))
                continue
            for name, instruction_flags in variants.items():
                command = [*compiler, *flags, *instruction_flags, f"-DSTABLE_SAM_INSTRUCTION_SET={name}"]
                jobs.append((source, command))
        objects = map(str, compile_objects(jobs, "cpu"))
        if sys.platform == "darwin":
            link = ["-dynamiclib", "-undefined", "dynamic_lookup"]
        else:
            link = ["-shared", f"-L{torch_libraries(torch)}", "-ltorch_cpu"]
        run([*compiler, *objects, *link, "-o", str(output.absolute())])
        return {"built": True, "torch": torch.__version__, "instruction_sets": list(variants)}

    def build_cuda(self, output: Path) -> dict:
        torch = import_torch()
        nvcc, version = cuda_compiler(torch)
        architectures = cuda_architectures(nvcc)
        objects = map(str, compile_cuda(nvcc, architectures))
        link = ["-ccbin", host_compiler()[0], "-shared", "-cudart", "shared"]
        libraries = [f"-L{torch_libraries(torch)}", "-ltorch_cpu", "-ltorch_cuda"]
        run([nvcc, *link, *objects, *libraries, "-o", str(output.absolute())])
        return {"built": True, "torch": torch.__version__, "cuda": version, "architectures": architectures}

    def build_info_module(self, extension: Extension) -> None:
        """Write the record into _C; without a working compiler leave it beside the package as JSON."""
        fallback = Path(self.get_ext_fullpath(extension.name)).with_name("_build_record.json")
        fallback.unlink(missing_ok=True)
        generated = Path(self.build_temp, "generated")
        generated.mkdir(parents=True, exist_ok=True)
        record = json.dumps(self.record, indent=1)
        header = f'constexpr char kBuildRecord[] = R"json({record})json";\n'
        generated.joinpath("build_record.h").write_text(header)
        try:
            import pybind11

            host_compiler()
            extension.include_dirs += [pybind11.get_include(), str(generated)]
            extension.extra_compile_args += ["-std=c++20", "-O1", "-g0", "-fvisibility=hidden"]
            self.force = True
            super().build_extension(extension)
        except Exception as error:
            if BUILD_MODE == "force":
                raise
            print(f"_C is not built: {error}", flush=True)
            fallback.parent.mkdir(parents=True, exist_ok=True)
            fallback.write_text(record + "\n")

    def get_outputs(self) -> list[str]:
        """Only what was really built: in auto mode a missing library is not an error."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Editable and in-place builds: copy what was built, drop stale libraries of earlier builds."""
        build_py = self.get_finalized_command("build_py")
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            target = Path(build_py.get_package_dir(PACKAGE), built.name)
            if built.exists():
                self.copy_file(str(built), str(target))
            else:
                target.unlink(missing_ok=True)
        record = Path(self.build_lib, PACKAGE, "_build_record.json")
        target = Path(build_py.get_package_dir(PACKAGE), record.name)
        target.unlink(missing_ok=True)
        if record.exists():
            self.copy_file(str(record), str(target))


def torch_includes(torch) -> list[str]:
    return ["-isystem", str(Path(torch.__file__).parent / "include"), "-Icsrc"]


def torch_libraries(torch) -> str:
    return str(Path(torch.__file__).parent / "lib")


def extensions() -> list[Extension]:
    if BUILD_MODE not in ("auto", "force", "none"):
        raise SystemExit(f"STABLE_SAM_BUILD: expected auto, force or none, got {BUILD_MODE!r}")
    if BUILD_MODE == "none":
        return []
    # _C comes last: it carries the record of what became of the others.
    sources = {"_ops_cpu": [], "_ops_cuda": [], "_C": ["csrc/build_info.cpp"]}
    return [Extension(f"{PACKAGE}.{name}", files, language="c++") for name, files in sources.items()]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), f"{PACKAGE}.kernels"],
        package_dir={f"{PACKAGE}.kernels": "kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildOperations},
    )
