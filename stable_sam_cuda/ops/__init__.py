"""The operators. Importing registers them: signatures, compiled kernels, Triton's, then what applies to all."""

import contextlib

from stable_sam_cuda.ops import schema  # isort: skip
from stable_sam_cuda import _extension  # noqa: F401  isort: skip
from stable_sam_cuda.ops import autocast, autograd, fake, reference

with contextlib.suppress(ImportError):  # Triton is optional; stable_sam_cuda.backends explains its absence
    from stable_sam_cuda.ops import triton  # noqa: F401

__all__ = ["autocast", "autograd", "fake", "reference", "schema"]
