"""Neural modules of Stable-SAM's plugin. They know the op, and nothing of SAM."""

from stable_sam_cuda.modules.offset_network import OffsetNetwork
from stable_sam_cuda.modules.router import DynamicRouter
from stable_sam_cuda.modules.sampler import DeformableSampler

__all__ = ["DeformableSampler", "DynamicRouter", "OffsetNetwork"]
