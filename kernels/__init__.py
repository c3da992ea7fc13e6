"""Triton kernels, installed as ``stable_sam_cuda.kernels``. Importing this package imports Triton.

Whether they are compiled or interpreted is settled by TRITON_INTERPRET at the time of import.
"""

from .attention_backward import sampled_attention_backward
from .attention_forward import sampled_attention
from .backward import deformable_sample_backward
from .forward import deformable_sample
from .head_backward import offset_head_backward
from .head_forward import offset_head
from .launch import INTERPRETED, NoPlanFitsError, SmallerPlanWarning

__all__ = [
    "INTERPRETED",
    "NoPlanFitsError",
    "SmallerPlanWarning",
    "deformable_sample",
    "deformable_sample_backward",
    "offset_head",
    "offset_head_backward",
    "sampled_attention",
    "sampled_attention_backward",
]
