"""The operations as functions, where users import them from; each stands in its own file of `stable_sam_cuda.ops`.

All tensors are (B, C, H, W): B prompts, C channels, an H x W feature map. Channels-last memory is the native one;
contiguous NCHW tensors are accepted and converted. A batch of 1 broadcasts against B for every argument.
"""

from stable_sam_cuda.ops.deformable_attention import deformable_attention
from stable_sam_cuda.ops.deformable_sample import deformable_sample
from stable_sam_cuda.ops.offset_head import offset_head

__all__ = ["deformable_attention", "deformable_sample", "offset_head"]
