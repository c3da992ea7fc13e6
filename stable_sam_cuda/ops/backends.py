"""Which implementation of the operations is used, which are there, and why one is not.

``cpu`` and ``cuda`` are the compiled kernels, ``triton`` runs on CUDA devices (and on the CPU under Triton's
interpreter), ``reference`` is plain PyTorch and runs everywhere.
"""

import warnings
from enum import Enum
from typing import NamedTuple

import torch

from stable_sam_cuda.ops import libraries


class Backend(str, Enum):
    """An implementation of the operations; ``AUTO`` leaves the choice to the package."""

    AUTO = "auto"
    CUDA = "cuda"
    TRITON = "triton"
    CPU = "cpu"
    REFERENCE = "reference"


class MissingBackendWarning(RuntimeWarning):
    """The compiled kernels for a device are missing, so ``auto`` uses the slower plain PyTorch instead."""


class UnfusedAttentionWarning(RuntimeWarning):
    """`deformable_attention` samples first and attends afterwards: slower, with more memory, equal in its result."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that this installation or machine does not have."""


_BY_NAME = {member.value: member for member in Backend}  # torch.compile of 2.11 cannot walk through an Enum
# float64 is for checking gradients; neither set of GPU kernels carries it.
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SUPPORTED_DTYPES = {
    Backend.CUDA: _GPU_DTYPES,
    Backend.TRITON: _GPU_DTYPES,
    Backend.CPU: (*_GPU_DTYPES, torch.float64),
    Backend.REFERENCE: (*_GPU_DTYPES, torch.float64),
}


# Operation -> type of device -> the backends that have kernels for it there, best first: what ``auto`` takes. The
# reference computes everything everywhere, and Triton's kernels run on the CPU, too, where they are interpreted.
KERNELS: dict[str, dict[str, tuple[Backend, ...]]] = {
    "deformable_sample": {"cpu": (Backend.CPU,), "cuda": (Backend.CUDA, Backend.TRITON)},
    "deformable_attention": {"cpu": (Backend.CPU,), "cuda": (Backend.TRITON,)},
    "offset_head": {"cpu": (Backend.CPU,), "cuda": (Backend.TRITON,)},
}
_TRITON_FLOOR = (8, 0)  # the compute capability from which on Triton's documentation promises support

# Why a backend is not installed. Devices are looked at later: importing this must not initialise CUDA.
MISSING: dict[Backend, str | None] = {
    Backend.CUDA: libraries.why_missing("_ops_cuda"),
    Backend.TRITON: libraries.why_missing("triton"),
    Backend.CPU: libraries.why_missing("_ops_cpu"),
    Backend.REFERENCE: None,
}


class Choice(NamedTuple):
    """What serves one call of an operation: never `Backend.AUTO`."""

    # The best that serves the tensors at all: that asked for by name, or what ``auto`` finds, else the reference.
    backend: Backend
    # The best that has kernels for the operation, or the reference where asked for by name; None: there is none.
    kernels: Backend | None


_choices: dict[tuple[str, str, torch.device, torch.dtype], Choice] = {}
told: set[str] = set()  # what warnings have said


def available() -> tuple[Backend, ...]:
    """The backends that can be used here, best first. Where CUDA is there, this initialises it."""
    return tuple(backend for backend in MISSING if why_unavailable(backend) is None)


def why_unavailable(backend: Backend | str, device: torch.device | None = None) -> str | None:
    """Why a backend cannot be used on a device, or on any device where none is given; None where it can.

    A GPU is asked for its compute capability, which initialises CUDA.

    Raises:
        ValueError: ``backend`` is not the name of a backend.
    """
    backend = parse(backend)
    if backend is Backend.AUTO:
        return None
    if MISSING[backend] is not None or not _needs_gpu(backend):
        return MISSING[backend]
    if device is not None:
        return _why_not_on(backend, device)
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [_why_not_on(backend, one) for one in devices or [torch.device("cuda", 0)]]
    return None if None in reasons else reasons[0]


def forget_choices() -> None:
    """Choose anew at the next call: for tests that change what is there. Warnings that were given stay given."""
    _choices.clear()


def _needs_gpu(backend: Backend) -> bool:
    return backend is Backend.CUDA or (backend is Backend.TRITON and not libraries.triton_interprets())


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None where torch sees none at all."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)  # torch.compile knows it, get_device_capability it does not
    return properties.major, properties.minor


def _why_not_on(backend: Backend, device: torch.device) -> str | None:
    """Why an installed backend cannot serve a device of a type that it takes."""
    if device.type != "cuda" or not _needs_gpu(backend):
        return None
    capability = capability_of(device)
    if capability is None:
        if backend is Backend.CUDA:
            return "torch sees no CUDA device"
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 was not set when stable_sam_cuda was imported"
    if backend is Backend.CUDA:
        return libraries.why_not_compiled_for(capability)
    if capability < _TRITON_FLOOR:
        asked = f"Triton asks for {_TRITON_FLOOR[0]}.{_TRITON_FLOOR[1]}"
        return f"the device has compute capability {capability[0]}.{capability[1]}, {asked}"
    return None


def parse(backend: Backend | str) -> Backend:
    """The `Backend` of that name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(backend, Backend):
        return backend
    if isinstance(backend, str) and backend in _BY_NAME:
        return _BY_NAME[backend]
    names = ", ".join(map(repr, _BY_NAME))
    raise ValueError(f"backend: expected one of {names}, got {backend!r}")


def _why_unfit(backend: Backend, device_type: str, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot go through a backend that is there."""
    fits_device = {
        Backend.CUDA: device_type == "cuda",
        Backend.TRITON: device_type == "cuda" or (device_type == "cpu" and libraries.triton_interprets()),
        Backend.CPU: device_type == "cpu",
        Backend.REFERENCE: True,
    }[backend]
    if not fits_device:
        return f"backend {backend.value!r} does not take tensors on {device_type!r}"
    if dtype not in _SUPPORTED_DTYPES[backend]:
        names = ", ".join(str(d).removeprefix("torch.") for d in _SUPPORTED_DTYPES[backend])
        return f"backend {backend.value!r} takes {names}, got {str(dtype).removeprefix('torch.')}"
    return None


def choose(operation: str, requested: Backend | str, device: torch.device, dtype: torch.dtype) -> Choice:
    """What serves an operation for tensors of this device and dtype: asked once a call, and handed down.

    ``auto`` takes the compiled kernels, else (on CUDA) Triton, else plain PyTorch: of several GPUs each has what runs
    there. Where plain PyTorch serves only because something is missing, one `MissingBackendWarning` says so.

    Raises:
        ValueError: ``requested`` is no backend, or does not take this device or dtype.
        BackendUnavailableError: ``requested`` is not there, or not for this device.
    """
    if _is_in_onnx_export():
        return _choose_for_onnx(parse(requested))
    if device.index is None and device.type == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if torch.compiler.is_compiling():  # a graph is traced once, and must not change the table
        return _find(operation, parse(requested), device, dtype)
    key = (operation, requested, device, dtype)
    choice = _choices.get(key) if isinstance(requested, str) else None
    if choice is None:
        choice = _choices[key] = _find(operation, parse(requested), device, dtype)
    return choice


@torch.compiler.assume_constant_result  # by itself, a compiler that traces for the export says no
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def _choose_for_onnx(requested: Backend) -> Choice:
    """ONNX has no operators for the kernels; plain PyTorch becomes operators that it has."""
    if requested is Backend.AUTO:
        return Choice(Backend.REFERENCE, None)
    if requested is Backend.REFERENCE:
        return Choice(Backend.REFERENCE, Backend.REFERENCE)
    raise BackendUnavailableError(
        f"backend {requested.value!r} does not go into ONNX: set plugin_of(sam).backend to 'auto' or 'reference' "
        "for the export"
    )


def _find(operation: str, requested: Backend, device: torch.device, dtype: torch.dtype) -> Choice:
    if requested is not Backend.AUTO:
        missing = why_unavailable(requested, device if device.type == "cuda" else None)
        if missing is not None:
            raise BackendUnavailableError(f"backend {requested.value!r} is not available: {missing}")
        unfit = _why_unfit(requested, device.type, dtype)
        if unfit is not None:
            raise ValueError(f"backend: {unfit}")
        return Choice(requested, requested if _computes(requested, operation) else None)

    # Every backend can sample.
    candidates = [c for c in KERNELS["deformable_sample"].get(device.type, ()) if dtype in _SUPPORTED_DTYPES[c]]
    reasons = {candidate: MISSING[candidate] or _why_not_on(candidate, device) for candidate in candidates}
    serving = [candidate for candidate, reason in reasons.items() if reason is None]
    if candidates and not serving:
        _warn_missing(device, "; ".join(f"{candidate.value}: {reason}" for candidate, reason in reasons.items()))
    with_kernels = [candidate for candidate in serving if _computes(candidate, operation)]
    return Choice(serving[0] if serving else Backend.REFERENCE, with_kernels[0] if with_kernels else None)


def _computes(backend: Backend, operation: str) -> bool:
    return backend is Backend.REFERENCE or any(backend in row for row in KERNELS[operation].values())


def _warn_missing(device: torch.device, reasons: str) -> None:
    """One `MissingBackendWarning` for each device and its reasons."""
    said = f"{device.type}: {reasons}"
    if said not in told:
        told.add(said)
        warnings.warn(
            f"stable_sam_cuda has no kernels for {device.type!r} tensors and uses plain PyTorch ({reasons})",
            MissingBackendWarning,
            stacklevel=5,
        )


def warn_unfused(reason: str) -> None:
    """One `UnfusedAttentionWarning` for each reason."""
    if reason not in told:
        told.add(reason)
        warnings.warn(
            f"deformable_attention samples first and attends afterwards: {reason}",
            UnfusedAttentionWarning,
            stacklevel=4,
        )
