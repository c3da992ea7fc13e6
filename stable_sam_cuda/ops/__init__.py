"""The three operations, on tensors alone. Importing registers them with PyTorch: ``torch.ops.stable_sam_cuda``."""

from stable_sam_cuda.ops import deformable_attention, deformable_sample, offset_head

__all__ = ["deformable_attention", "deformable_sample", "offset_head"]
