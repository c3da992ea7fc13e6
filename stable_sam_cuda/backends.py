"""Which implementation of the operations is used, which are there, and why one is not: what users may ask.

``cpu`` and ``cuda`` are the compiled kernels, ``triton`` runs on CUDA devices (and on the CPU under Triton's
interpreter), ``reference`` is plain PyTorch and runs everywhere. The choice is made in `stable_sam_cuda.ops.backends`.
"""

import torch

from stable_sam_cuda.ops import backends
from stable_sam_cuda.ops.backends import (
    Backend,
    BackendUnavailableError,
    MissingBackendWarning,
    UnfusedAttentionWarning,
    available,
    forget_choices,
    parse,
    why_unavailable,
)

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "MissingBackendWarning",
    "UnfusedAttentionWarning",
    "available",
    "choose",
    "forget_choices",
    "parse",
    "why_unavailable",
]


def choose(requested: Backend | str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that serves tensors of this device and dtype: never `Backend.AUTO`.

    ``auto`` takes the compiled kernels, else (on CUDA) Triton, else plain PyTorch: of several GPUs each has what runs
    there. Where plain PyTorch serves only because something is missing, one `MissingBackendWarning` says so.

    Raises:
        ValueError: ``requested`` is no backend, or does not take this device or dtype.
        BackendUnavailableError: ``requested`` is not there, or not for this device.
    """
    return backends.choose("deformable_sample", requested, device, dtype).backend
