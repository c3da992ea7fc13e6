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


_BY_NAME = {member.value: member for member in Backend}  # torch.compile of 2.11 cannot walk through an Enum
# float64 is for checking gradients; neither set of GPU kernels carries it.
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SUPPORTED_DTYPES = {
    Backend.CUDA: _GPU_DTYPES,
    Backend.TRITON: _GPU_DTYPES,
    Backend.CPU: (*_GPU_DTYPES, torch.float64),
    Backend.REFERENCE: (*_GPU_DTYPES, torch.float64),
}


# Triton's own: its documentation promises compute capability 8.0 and newer.
_TRITON_FLOOR = (8, 0)


def _find_why_missing(backend: Backend) -> str | None:
    """Why a backend is not installed. Devices are looked at later: importing this must not initialise CUDA."""
    if backend is Backend.CPU:
        return _extension.why_missing("_ops_cpu")
    if backend is Backend.CUDA:
        return _extension.why_missing("_ops_cuda")
    return triton_kernels.why_unavailable() if backend is Backend.TRITON else None


_AUTO_CANDIDATES = {"cpu": (Backend.CPU,), "cuda": (Backend.CUDA, Backend.TRITON)}
_UNAVAILABLE: dict[Backend, str | None] = {
    backend: _find_why_missing(backend) for backend in Backend if backend is not Backend.AUTO
}
# Backend asked for, device and dtype -> the backends that serve there, best first.
_serving: dict[tuple[Backend, torch.device, torch.dtype], tuple[Backend, ...]] = {}
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
    """The backends that can be used here, best first. Where CUDA is there, this initialises it."""
    return tuple(backend for backend in _UNAVAILABLE if why_unavailable(backend) is None)


def why_unavailable(backend: Backend | str, device: torch.device | None = None) -> str | None:
    """Why a backend cannot be used on a device, or on any device where none is given; None where it can.

    A GPU is asked for its compute capability, which initialises CUDA.

    Raises:
        ValueError: ``backend`` is not the name of a backend.
    """
    backend = parse(backend)
    if backend is Backend.AUTO:
        return None
    if _UNAVAILABLE[backend] is not None or not _needs_gpu(backend):
        return _UNAVAILABLE[backend]
    if device is not None:
        return _why_not_on(backend, device)
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [_why_not_on(backend, one) for one in devices or [torch.device("cuda", 0)]]
    return None if None in reasons else reasons[0]


def forget_choices() -> None:
    """Choose anew at the next call: for tests that change what is there. Warnings that were given stay given."""
    _serving.clear()


def _needs_gpu(backend: Backend) -> bool:
    return backend is Backend.CUDA or (backend is Backend.TRITON and not triton_kernels.interprets())


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None where torch sees none at all."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)  # torch.compile knows it, get_device_capability it does not
    return properties.major, properties.minor


def _why_not_on(backend: Backend, device: torch.device) -> str | None:
    """Why an installed backend cannot serve a device of a type that it takes."""
    if device.type != "cuda" or not _needs_gpu(backend):
        return None
    capability = _capability(device)
    if capability is None:
        if backend is Backend.CUDA:
            return "torch sees no CUDA device"
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 was not set when stable_sam_cuda was imported"
    if backend is Backend.CUDA:
        return _extension.why_not_compiled_for(capability)
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

    ``auto`` takes the compiled kernels, else (on CUDA) Triton, else plain PyTorch: of several GPUs each has what runs
    there. Where plain PyTorch serves only because something is missing, one `MissingBackendWarning` says so.

    Raises:
        ValueError: ``requested`` is no backend, or does not take this device or dtype.
        BackendUnavailableError: ``requested`` is not there, or not for this device.
    """
    return _serve(parse(requested), device, dtype)[0]


def _serve(requested: Backend, device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The backends that serve, best first: that asked for by name, or all that ``auto`` may take, PyTorch last."""
    if _is_in_onnx_export():
        return _serve_onnx(requested)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if torch.compiler.is_compiling():  # a graph is traced once, and must not change the table
        return _find_serving(requested, device, dtype)
    found = _serving.get((requested, device, dtype))
    if found is None:
        found = _serving[requested, device, dtype] = _find_serving(requested, device, dtype)
    return found


@torch.compiler.assume_constant_result  # by itself, a compiler that traces for the export says no
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def _serve_onnx(requested: Backend) -> tuple[Backend, ...]:
    """ONNX has no operators for the kernels; plain PyTorch becomes operators that it has."""
    if requested not in (Backend.AUTO, Backend.REFERENCE):
        raise BackendUnavailableError(
            f"backend {requested.value!r} does not go into ONNX: set plugin_of(sam).backend to 'auto' or 'reference' "
            "for the export"
        )
    return (Backend.REFERENCE,)


def _find_serving(requested: Backend, device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    if requested is not Backend.AUTO:
        missing = why_unavailable(requested, device if device.type == "cuda" else None)
        if missing is not None:
            raise BackendUnavailableError(f"backend {requested.value!r} is not available: {missing}")
        unfit = _why_unfit(requested, device.type, dtype)
        if unfit is not None:
            raise ValueError(f"backend: {unfit}")
        return (requested,)

    candidates = [c for c in _AUTO_CANDIDATES.get(device.type, ()) if dtype in _SUPPORTED_DTYPES[c]]
    reasons = {candidate: _UNAVAILABLE[candidate] or _why_not_on(candidate, device) for candidate in candidates}
    serving = tuple(candidate for candidate, reason in reasons.items() if reason is None)
    if candidates and not serving:
        _warn_missing(device, "; ".join(f"{candidate.value}: {reason}" for candidate, reason in reasons.items()))
    return (*serving, Backend.REFERENCE)


def _warn_missing(device: torch.device, reasons: str) -> None:
    """One `MissingBackendWarning` for each device and its reasons."""
    said = f"{device.type}: {reasons}"
    if said not in _warned:
        _warned.add(said)
        warnings.warn(
            f"stable_sam_cuda has no kernels for {device.type!r} tensors and uses plain PyTorch ({reasons})",
            MissingBackendWarning,
            stacklevel=6,
        )


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
    requested = parse(requested)
    for serving in _serve(requested, device, dtype):
        if serving is Backend.REFERENCE:
            return serving if requested is Backend.REFERENCE else None
        if has_kernels[serving]:
            return serving
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
