"""Which implementation of the operations is used, which are there, and why one is not.

``cpu`` and ``cuda`` are the compiled kernels, ``triton`` runs on CUDA devices (and on the CPU under Triton's
interpreter), ``reference`` is plain PyTorch and runs everywhere.
"""

import warnings
from enum import Enum

import torch

from stable_sam_cuda import _extension
from stable_sam_cuda.ops import triton as triton_kernels


class Backend(str, Enum):
    """An implementation of the operations; ``AUTO`` leaves the choice to `choose`."""

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


# float64 is for checking gradients; neither set of GPU kernels carries it.
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SUPPORTED_DTYPES = {
    Backend.CUDA: _GPU_DTYPES,
    Backend.TRITON: _GPU_DTYPES,
    Backend.CPU: (*_GPU_DTYPES, torch.float64),
    Backend.REFERENCE: (*_GPU_DTYPES, torch.float64),
}


def _find_why_unavailable(backend: Backend) -> str | None:
    if backend is Backend.CPU:
        return _extension.why_missing("_ops_cpu")
    if backend is Backend.REFERENCE:
        return None
    if backend is Backend.CUDA:
        missing = _extension.why_missing("_ops_cuda")
        return missing or (None if torch.cuda.is_available() else "torch sees no CUDA device")
    if triton_kernels.why_unavailable() is None and not torch.cuda.is_available() and not triton_kernels.interprets():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 was not set when stable_sam_cuda was imported"
    return triton_kernels.why_unavailable()


_AUTO_CANDIDATES = {"cpu": (Backend.CPU,), "cuda": (Backend.CUDA, Backend.TRITON)}
_UNAVAILABLE: dict[Backend, str | None] = {
    backend: _find_why_unavailable(backend) for backend in Backend if backend is not Backend.AUTO
}
_warned: set[str] = set()


def _has_kernels(backend: Backend, operation: str) -> bool:
    name = f"{operation}_triton" if backend is Backend.TRITON else operation
    key = "CPU" if backend is Backend.CPU or (backend is Backend.TRITON and triton_kernels.interprets()) else "CUDA"
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"stable_sam_cuda::{name}", key)


_FUSES_ATTENTION = {backend: _has_kernels(backend, "sampled_attention") for backend in _UNAVAILABLE}
_HAS_OFFSET_HEAD = {
    backend: backend is Backend.REFERENCE or _has_kernels(backend, "offset_head") for backend in _UNAVAILABLE
}


def available() -> tuple[Backend, ...]:
    """The backends that can be used here, best first."""
    return tuple(backend for backend, reason in _UNAVAILABLE.items() if reason is None)


def why_unavailable(backend: Backend | str) -> str | None:
    """Why a backend cannot be used here; None where it can.

    Raises:
        ValueError: ``backend`` is not the name of a backend.
    """
    backend = parse(backend)
    return None if backend is Backend.AUTO else _UNAVAILABLE[backend]


def parse(backend: Backend | str) -> Backend:
    """The `Backend` of that name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(backend, Backend):
        return backend
    for member in Backend:
        if backend == member.value:
            return member
    names = ", ".join(repr(member.value) for member in Backend)
    raise ValueError(f"backend: expected one of {names}, got {backend!r}")


def _why_unfit(backend: Backend, device_type: str, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot go through a backend that is there."""
    fits_device = {
        Backend.CUDA: device_type == "cuda",
        Backend.TRITON: device_type == "cuda" or (device_type == "cpu" and triton_kernels.interprets()),
        Backend.CPU: device_type == "cpu",
        Backend.REFERENCE: True,
    }[backend]
    if not fits_device:
        return f"backend {backend.value!r} does not take tensors on {device_type!r}"
    if dtype not in _SUPPORTED_DTYPES[backend]:
        names = ", ".join(str(d).removeprefix("torch.") for d in _SUPPORTED_DTYPES[backend])
        return f"backend {backend.value!r} takes {names}, got {str(dtype).removeprefix('torch.')}"
    return None


def choose(requested: Backend | str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that serves tensors of this device and dtype: never `Backend.AUTO`.

    ``auto`` takes the compiled kernels, else (on CUDA) Triton, else plain PyTorch. Where plain PyTorch serves
    only because something was not built, one `MissingBackendWarning` says so.

    Raises:
        ValueError: ``requested`` is no backend, or does not take this device or dtype.
        BackendUnavailableError: ``requested`` is not there.
    """
    backend = parse(requested)
    if backend is not Backend.AUTO:
        if _UNAVAILABLE[backend] is not None:
            raise BackendUnavailableError(f"backend {backend.value!r} is not available: {_UNAVAILABLE[backend]}")
        unfit = _why_unfit(backend, device.type, dtype)
        if unfit is not None:
            raise ValueError(f"backend: {unfit}")
        return backend

    candidates = _AUTO_CANDIDATES.get(device.type, ())
    for candidate in candidates:
        if dtype in _SUPPORTED_DTYPES[candidate] and _UNAVAILABLE[candidate] is None:
            return candidate
    missing = [c for c in candidates if dtype in _SUPPORTED_DTYPES[c]]
    if missing and device.type not in _warned:
        _warned.add(device.type)
        reasons = "; ".join(f"{c.value}: {_UNAVAILABLE[c]}" for c in missing)
        warnings.warn(
            f"stable_sam_cuda has no kernels for {device.type!r} tensors and uses plain PyTorch ({reasons})",
            MissingBackendWarning,
            stacklevel=3,
        )
    return Backend.REFERENCE


def find_for_attention(requested: Backend | str, device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The backend whose fused attention serves these tensors: that asked for, by ``auto`` the first that has it.

    None where there is no such kernel. The reference counts as fused where it was asked for by name.

    Raises:
        As `choose`.
    """
    return _find(_FUSES_ATTENTION, requested, device, dtype)


def find_for_offset_head(requested: Backend | str, device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The backend whose offset head serves these tensors, as `find_for_attention` finds one.

    Raises:
        As `choose`.
    """
    return _find(_HAS_OFFSET_HEAD, requested, device, dtype)


def _find(
    has_kernels: dict[Backend, bool], requested: Backend | str, device: torch.device, dtype: torch.dtype
) -> Backend | None:
    chosen = choose(requested, device, dtype)
    if parse(requested) is not Backend.AUTO:
        return chosen if chosen is Backend.REFERENCE or has_kernels[chosen] else None
    for candidate in _AUTO_CANDIDATES.get(device.type, ()):
        if dtype in _SUPPORTED_DTYPES[candidate] and _UNAVAILABLE[candidate] is None and has_kernels[candidate]:
            return candidate
    return None


def choose_for_attention(requested: Backend | str, device: torch.device, dtype: torch.dtype) -> tuple[Backend, bool]:
    """As `choose`, and whether that backend has the fused kernel; ``auto`` prefers one that has it.

    Where it has not, one `UnfusedAttentionWarning` says so. The reference counts as fused: it computes the same.

    Raises:
        As `choose`.
    """
    fused = find_for_attention(requested, device, dtype)
    if fused is not None:
        return fused, True
    chosen = choose(requested, device, dtype)
    if chosen is Backend.REFERENCE:
        return chosen, True
    warn_unfused(f"backend {chosen.value!r} has no fused kernel for it")
    return chosen, False


def choose_for_offset_head(requested: Backend | str, device: torch.device, dtype: torch.dtype) -> Backend:
    """As `choose`, among the backends that have the kernel: on CUDA that is Triton's.

    Raises:
        As `choose`.
    """
    found = find_for_offset_head(requested, device, dtype)
    if found is not None:
        return found
    if parse(requested) is Backend.AUTO:
        return Backend.REFERENCE
    others = [other for other in _AUTO_CANDIDATES.get(device.type, ()) if _HAS_OFFSET_HEAD[other]]
    names = ", ".join(repr(other.value) for other in (*others, Backend.REFERENCE))
    raise BackendUnavailableError(
        f"backend {parse(requested).value!r} has no kernels for offset_head; expected one of {names}"
    )


def warn_unfused(reason: str) -> None:
    """One `UnfusedAttentionWarning` for each reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"deformable_attention samples first and attends afterwards: {reason}",
            UnfusedAttentionWarning,
            stacklevel=4,
        )
