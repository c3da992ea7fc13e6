"""Loads the compiled libraries and remembers why one is missing.

The CPU and the CUDA library are loaded apart, because the second cannot be loaded by a torch built without
CUDA. A missing library is a state to be explained (`why_missing`), never an error at import.
"""

import ctypes
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_DIRECTORY = Path(__file__).parent
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


_MISSING = {name: _load(name) for name in ("_ops_cpu", "_ops_cuda")}


def why_missing(name: str) -> str | None:
    """Why the library `_ops_cpu` or `_ops_cuda` is not loaded; None where it is."""
    return _MISSING[name]


def cpu_instruction_set() -> str | None:
    """Instruction set that the loaded CPU kernels use: baseline, avx2 or avx512; None without them."""
    if why_missing("_ops_cpu") is not None:
        return None
    library = ctypes.CDLL(str(next(_DIRECTORY.glob("_ops_cpu.*"))))
    library.stable_sam_cpu_instruction_set.restype = ctypes.c_char_p
    return library.stable_sam_cpu_instruction_set().decode()
