"""Shapes, dtypes and strides of every op's results, for torch.compile and torch.export; no arithmetic.

Dense (B, C, H, W) results are channels-last, ``grad_offsets`` is contiguous; both compiled and Triton kernels
return exactly this.
"""

import torch
from torch import Tensor

from stable_sam_cuda.ops.schema import NAMESPACE

FEATURES, OFFSETS, IDENTITY, ALPHA, AMPLITUDE = (1 << bit for bit in range(5))


def _output_batch(*inputs: Tensor | None) -> int:
    return torch.broadcast_shapes(*[t.shape[:1] for t in inputs if t is not None])[0]


def _empty_channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def deformable_sample(
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
) -> Tensor:
    batch = _output_batch(features, offsets, identity, alpha, amplitude)
    return _empty_channels_last(features, (batch, *features.shape[1:]))


def deformable_sample_backward(
    grad_output: Tensor,
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
    grad_mask: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = grad_output.shape
    nothing = features.new_empty((0,))

    def wanted(bit: int, tensor: Tensor | None) -> bool:
        return bool(grad_mask & bit) and tensor is not None

    return (
        _empty_channels_last(features, tuple(features.shape)) if wanted(FEATURES, features) else nothing,
        features.new_empty((batch, 2, height, width)) if wanted(OFFSETS, offsets) else nothing.clone(),
        _empty_channels_last(features, tuple(identity.shape)) if wanted(IDENTITY, identity) else nothing.clone(),
        features.new_empty((batch, 2)) if wanted(ALPHA, alpha) else nothing.clone(),
        _empty_channels_last(features, (batch, *amplitude.shape[1:]))
        if wanted(AMPLITUDE, amplitude)
        else nothing.clone(),
    )


for variant in ("deformable_sample", "deformable_sample_triton"):
    torch.library.register_fake(f"{NAMESPACE}::{variant}", deformable_sample)
    torch.library.register_fake(f"{NAMESPACE}::{variant}_backward", deformable_sample_backward)
