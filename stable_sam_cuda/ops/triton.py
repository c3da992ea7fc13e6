"""Registers the Triton kernels: for CUDA, and for the CPU where Triton interprets (TRITON_INTERPRET=1).

Triton is optional, and the kernels are compiled on first use, so importing this needs neither GPU nor Triton:
where Triton cannot be imported nothing is registered and `why_unavailable` says why.
"""

from typing import Any

from stable_sam_cuda.ops.schema import library


def _import_kernels() -> tuple[Any, str | None]:
    """The kernels and no reason, or no kernels and the reason."""
    try:
        from stable_sam_cuda import kernels
    except Exception as error:  # a Triton that does not fit torch or the driver fails in many ways
        return None, f"Triton's kernels could not be imported: {type(error).__name__}: {error}"
    return kernels, None


class _NeverRaisedError(Exception):
    """What kernels that are not there raise."""


_kernels, _reason = _import_kernels()
NoPlanFitsError: type[Exception] = _NeverRaisedError if _kernels is None else _kernels.NoPlanFitsError


def interprets() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU: decided when they are imported."""
    return _kernels is not None and _kernels.INTERPRETED


def why_unavailable() -> str | None:
    """Why the kernels could not be imported; None where they were."""
    return _reason


if _kernels is not None:
    for _key in ("CUDA", "CPU") if interprets() else ("CUDA",):
        for _operation in ("deformable_sample", "sampled_attention", "offset_head"):
            library.impl(f"{_operation}_triton", getattr(_kernels, _operation), _key)
            library.impl(f"{_operation}_triton_backward", getattr(_kernels, f"{_operation}_backward"), _key)
