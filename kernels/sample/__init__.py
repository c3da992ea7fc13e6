"""deformable_sample: bilinear values at learned offsets, and their gradients."""

from .backward import deformable_sample_backward
from .forward import deformable_sample

__all__ = ["deformable_sample", "deformable_sample_backward"]
