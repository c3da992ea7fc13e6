"""Loads the compiled libraries and Triton's kernels, and remembers why one of them is missing.

The CPU and the CUDA library are loaded apart, because the second cannot be loaded by a torch built without
CUDA. Triton is optional; its kernels are compiled on first use, so importing them needs no GPU. What is missing is a
state to be explained (`why_missing`), never an error at import.
"""

import ctypes
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

_JETSON_ORIN = (8, 7)  # of its own kind: code for the desktop's 8.0 and 8.6 does not run there

_KERNELS = "stable_sam_cuda.kernels"
_DIRECTORY = Path(__file__).parents[1]
_BUILD_RECORD = _DIRECTORY / "_build_record.json"


def build_info() -> dict[str, Any]:
    """What was built, with what, and why something was not; empty where the package was never built."""
    if _BUILD_RECORD.exists():  # written only where _C itself could not be built
        return json.loads(_BUILD_RECORD.read_text())
    try:
        return import_module("stable_sam_cuda._C").build_info()
    except ImportError:
        return {}


def _load(name: str) -> str | None:
    """Load one library; None on success, else the reason it is missing."""
    paths = sorted(_DIRECTORY.glob(f"{name}.*"))
    paths = [path for path in paths if path.suffix in (".so", ".dylib", ".pyd")]
    if not paths:
        reason = build_info().get("libraries", {}).get(name, {}).get("reason")
        return f"not built: {reason}" if reason else "not built: the package was installed without compiling"
    if name == "_ops_cuda" and torch.version.cuda is None:
        return f"built, but the torch that runs, {torch.__version__}, has no CUDA"
    try:
        torch.ops.load_library(paths[0])
    except (OSError, RuntimeError) as error:
        return f"built, but could not be loaded by torch {torch.__version__}: {error}"
    return None


def _import_triton() -> tuple[Any, str | None]:
    """Triton's kernels and no reason, or no kernels and the reason.

    Raises:
        ImportError: the kernels are there, and a module or a name of this package that they import is not.
    """
    try:
        import triton
    except Exception as error:  # one that does not fit torch or the driver fails in many ways
        return None, f"Triton could not be imported: {type(error).__name__}: {error}"
    try:
        return import_module(_KERNELS), None
    except Exception as error:
        name = (error.name or "") if isinstance(error, ImportError) else ""
        if isinstance(error, ModuleNotFoundError) and name == _KERNELS:
            return None, (
                "Triton's kernels are not installed: a checkout has them in kernels/, and installing it "
                f"(pip install -e .) makes that {_KERNELS}"
            )
        if name.partition(".")[0] == "stable_sam_cuda":
            raise
        return None, f"Triton {triton.__version__} does not fit the kernels: {type(error).__name__}: {error}"


class _NeverRaisedError(Exception):
    """What kernels that are not there raise."""


TRITON, _why_no_triton = _import_triton()  # the module of the kernels, or None
NoPlanFitsError: type[Exception] = _NeverRaisedError if TRITON is None else TRITON.NoPlanFitsError
_MISSING = {name: _load(name) for name in ("_ops_cpu", "_ops_cuda")} | {"triton": _why_no_triton}


def why_missing(name: str) -> str | None:
    """Why the library ``_ops_cpu`` or ``_ops_cuda``, or ``triton``, is not loaded; None where it is."""
    return _MISSING[name]


def triton_interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: decided when they are imported."""
    return TRITON is not None and TRITON.INTERPRETED


class Architecture(NamedTuple):
    """What device code was compiled for: ``9.0``, ``9.0a``, ``10.0f``, each with ``+PTX`` or without."""

    name: str
    version: tuple[int, int]
    suffix: str
    has_ptx: bool

    @classmethod
    def parse(cls, name: str) -> "Architecture | None":
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        return match and cls(name, (int(match[1]), int(match[2])), match[3], match[4] is not None)

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability runs the code.

        Machine code runs within its major version from its own minor version on, PTX on everything from its own
        version on. Code for ``9.0a`` runs on 9.0 alone; that for ``10.0f`` keeps to its major version, PTX or not.
        """
        if self.suffix == "a" or (capability == _JETSON_ORIN and not self.has_ptx):
            return capability == self.version
        within_major = capability[0] == self.version[0] and capability >= self.version
        return within_major or (self.has_ptx and not self.suffix and capability >= self.version)


def _read_architectures() -> tuple[Architecture, ...]:
    names = build_info().get("libraries", {}).get("_ops_cuda", {}).get("architectures", ())
    return tuple(filter(None, map(Architecture.parse, names)))


# What the CUDA library was compiled for: empty where there is none, or no record of it.
ARCHITECTURES = _read_architectures()


def why_not_compiled_for(capability: tuple[int, int]) -> str | None:
    """Why the CUDA library cannot run on a device of this compute capability; None where it can, as far as is known."""
    if not ARCHITECTURES or any(architecture.runs_on(capability) for architecture in ARCHITECTURES):
        return None
    names = ", ".join(architecture.name for architecture in ARCHITECTURES)
    return f"the device has compute capability {capability[0]}.{capability[1]}, the library was compiled for {names}"


def cpu_instruction_set() -> str | None:
    """Instruction set that the loaded CPU kernels use: baseline, avx2 or avx512; None without them."""
    if why_missing("_ops_cpu") is not None:
        return None
    library = ctypes.CDLL(str(next(_DIRECTORY.glob("_ops_cpu.*"))))
    library.stable_sam_cpu_instruction_set.restype = ctypes.c_char_p
    return library.stable_sam_cpu_instruction_set().decode()
