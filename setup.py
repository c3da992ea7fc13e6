"""Builds the compiled operations with ninja. Everything that is not compiled is declared in pyproject.toml.

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
The first two use torch's stable ABI (torch >= 2.11) and know nothing of Python. build_tools/libraries.py says what
they are made of, build_tools/ninja_build.py has ninja make them.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))  # pip has no folder of ours on the path
from libraries import cpu_library, cuda_library, host_compiler
from ninja_build import BuildSkippedError, build, write_if_changed

OLDEST_SETUPTOOLS = 77  # of those before, none reads this project's licence
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"setuptools: expected {OLDEST_SETUPTOOLS} or later, got {setuptools.__version__}. Without build isolation, "
        "install what the build needs first: pip install 'setuptools>=77' wheel 'pybind11>=2.12' ninja"
    )

PACKAGE = "stable_sam_cuda"
BUILD_MODE = os.environ.get("STABLE_SAM_BUILD", "auto")


class BuildOperations(build_ext):
    """Builds the two operator libraries with ninja and _C as setuptools would."""

    def run(self) -> None:
        self.record = {"mode": BUILD_MODE, "libraries": {}}
        super().run()

    def build_extension(self, extension: Extension) -> None:
        name = extension.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(extension.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        if name == "_C":
            return self.build_info_module(extension, output)
        output.unlink(missing_ok=True)
        try:
            library = {"_ops_cpu": cpu_library, "_ops_cuda": cuda_library}[name]()
            build(library, output)
            self.record["libraries"][name] = library.facts
        except BuildSkippedError as error:
            if BUILD_MODE == "force":
                raise SystemExit(f"STABLE_SAM_BUILD=force: {name} cannot be built: {error}") from error
            print(f"{name} is not built: {error}", flush=True)
            self.record["libraries"][name] = {"built": False, "reason": str(error)}

    def build_info_module(self, extension: Extension, output: Path) -> None:
        """Write the record into _C; without a working compiler leave it beside the package as JSON."""
        fallback = output.with_name("_build_record.json")
        fallback.unlink(missing_ok=True)
        record = json.dumps(self.record, indent=1)
        header = Path(self.build_temp, "generated", "build_record.h")
        write_if_changed(header, f'constexpr char kBuildRecord[] = R"json({record})json";\n'.encode())
        try:
            import pybind11

            host_compiler()
            extension.include_dirs += [pybind11.get_include(), str(header.parent)]
            extension.extra_compile_args += ["-std=c++20", "-O1", "-g0", "-fvisibility=hidden"]
            # Not by extension.depends: what stands there would be packed into an sdist.
            if output.exists() and output.stat().st_mtime < header.stat().st_mtime:
                self.force = True
            super().build_extension(extension)
        except Exception as error:
            if BUILD_MODE == "force":
                raise
            print(f"_C is not built: {error}", flush=True)
            output.unlink(missing_ok=True)
            fallback.write_text(record + "\n")

    def get_outputs(self) -> list[str]:
        """Only what was really built: in auto mode a missing library is not an error."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Editable and in-place builds: copy what was built, whatever its time; drop what earlier builds left."""
        package = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        names = [Path(self.get_ext_filename(extension.name)).name for extension in self.extensions]
        for name in [*names, "_build_record.json"]:
            package.joinpath(name).unlink(missing_ok=True)
            built = Path(self.build_lib, PACKAGE, name)
            if built.exists():
                shutil.copy(built, package / name)


def extensions() -> list[Extension]:
    if BUILD_MODE not in ("auto", "force", "none"):
        raise SystemExit(f"STABLE_SAM_BUILD: expected auto, force or none, got {BUILD_MODE!r}")
    if BUILD_MODE == "none":
        return []
    # _C comes last: it carries the record of what became of the others.
    sources = {"_ops_cpu": [], "_ops_cuda": [], "_C": ["csrc/build_info.cpp"]}
    return [Extension(f"{PACKAGE}.{name}", files, language="c++") for name, files in sources.items()]


def kernel_packages() -> list[str]:
    """The folder kernels/ and those in it, as the package has them."""
    return [f"{PACKAGE}.kernels", *(f"{PACKAGE}.kernels.{name}" for name in find_packages("kernels"))]


if __name__ == "__main__":
    setup(
        packages=sorted({*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), *kernel_packages()}),
        package_dir={f"{PACKAGE}.kernels": "kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildOperations},
    )
