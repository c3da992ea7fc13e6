"""offset_head: depthwise convolution, norm, GELU and two numbers a pixel, and their gradients."""

from .backward import offset_head_backward
from .forward import offset_head

__all__ = ["offset_head", "offset_head_backward"]
