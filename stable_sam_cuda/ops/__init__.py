"""The operators. Importing registers them: signatures, compiled kernels, Triton's, then what applies to all."""

from stable_sam_cuda.ops import schema  # isort: skip
from stable_sam_cuda import _extension  # noqa: F401  isort: skip
from stable_sam_cuda.ops import autocast, autograd, fake, reference, triton

__all__ = ["autocast", "autograd", "fake", "reference", "schema", "triton"]
