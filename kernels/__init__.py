"""Triton kernels, installed as ``stable_sam_cuda.kernels``. Importing this package imports Triton.

Whether they are compiled or interpreted is settled by TRITON_INTERPRET at the time of import.

    launch.py     the device, block sizes that fit it, the launch      shapes.py    the inputs, as kernels take them
    location.py   where pixels lie and where each is sampled
    sample/       deformable_sample      attention/   sampled_attention      offset_head/   offset_head
"""

from .attention import sampled_attention, sampled_attention_backward
from .launch import INTERPRETED, NoPlanFitsError, SmallerPlanWarning
from .offset_head import offset_head, offset_head_backward
from .sample import deformable_sample, deformable_sample_backward

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
