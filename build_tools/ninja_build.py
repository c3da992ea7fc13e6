"""Builds a library with ninja, in a folder that is kept from build to build."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# What a compiler says goes to a file beside the object, so that it can be read when nothing was compiled, too.
NINJA_RULES = """\
rule compile
  command = $compiler -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }
  depfile = $out.d
  deps = gcc
rule link
  command = $linker $in $libraries -o $out
"""


class BuildSkippedError(Exception):
    """A library cannot be built here; the message says why, for `doctor` and for the build log."""


class Library(NamedTuple):
    """What ninja has to know of a library. Paths are relative to the folder of all objects, where it runs."""

    folder: str  # of this library's objects and of ninja's own records
    objects: dict[str, tuple[str, list[str]]]  # object -> its source, the compiler with its flags
    linker: list[str]
    libraries: list[str]
    versions: list[str]  # of what no command line and no depfile tells: compilers, torch
    facts: dict  # for the build record

    @property
    def path(self) -> str:
        return f"{self.folder}/library.so"

    def manifest(self) -> str:
        """The text of build.ninja."""

        def words(command: list[str]) -> str:
            return shlex.join(command).replace("$", "$$")

        lines = [f"builddir = {self.folder}", NINJA_RULES]
        for name, (source, command) in self.objects.items():
            lines += [f"build {name}: compile {source} | {self.folder}/versions", f"  compiler = {words(command)}"]
        lines += [f"build {self.path}: link {' '.join(self.objects)}", f"  linker = {words(self.linker)}"]
        return "\n".join([*lines, f"  libraries = {words(self.libraries)}", ""])


def sources(*patterns: str) -> list[Path]:
    """The files of the source tree that fit, relative to it."""
    return sorted(path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def find_ninja() -> str:
    """PyPI's before any other: of two versions, neither reads the other's records, and each would build all anew."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""  # noqa: N806
    ninja = shutil.which("ninja", path=BIN_DIR or os.devnull) or shutil.which("ninja")
    if ninja is None:
        raise BuildSkippedError("ninja was not found: pip install ninja")
    return ninja


def objects_folder() -> Path:
    return Path(os.environ.get("STABLE_SAM_OBJECTS") or ROOT / "build" / "objects").absolute()


def build(library: Library, output: Path | None = None) -> None:
    """Have ninja make what is missing or outdated of a library, and put a copy of it in ``output``."""
    import fcntl  # there is none on Windows, where host_compiler has said so by now

    ninja, folder = find_ninja(), objects_folder()
    folder.joinpath(library.folder).mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: ninja does not expect another ninja
        copy_sources(folder)
        manifest = folder / library.folder / "build.ninja"
        write_if_changed(manifest, library.manifest().encode())
        write_if_changed(manifest.with_name("versions"), "\n".join(library.versions).encode())
        run_ninja([ninja, "-C", str(folder), "-f", f"{library.folder}/build.ninja", "-v"])
        if output is not None:
            shutil.copy(folder / library.path, output)


def copy_sources(folder: Path) -> None:
    """Make ``folder``/csrc equal to csrc, and touch what differs only.

    ninja goes by times, and those of a fresh checkout or of an unpacked sdist say nothing. Those of the copies do.
    """
    contents = {path: ROOT.joinpath(path).read_bytes() for path in sources("csrc/**/*")}
    for copy in folder.glob("csrc/**/*"):
        if copy.is_file() and copy.relative_to(folder) not in contents:
            copy.unlink()
    for path, content in contents.items():
        write_if_changed(folder / path, content)


def write_if_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def run_ninja(command: list[str]) -> None:
    """What it says is printed as it comes; where it fails, what it says of that becomes the reason."""
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    # In the environment, since another number of threads in the command lines would have ninja compile all again.
    environment = os.environ | {"NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads {jobs}"}
    process = subprocess.Popen(
        [*command, "-j", jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    said = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        said += line
    if process.wait() != 0:
        failure = re.search(r"^FAILED: .*", said, re.MULTILINE | re.DOTALL)
        raise BuildSkippedError(f"ninja failed:\n{(failure[0] if failure else said).strip()[-4000:]}")
