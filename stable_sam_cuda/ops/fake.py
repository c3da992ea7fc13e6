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


def _like_image(like: Tensor, image: Tensor, batch: int | None = None) -> Tensor:
    """Dense channels-last of the image's shape, with another batch where one is given."""
    own_batch, *rest = image.shape
    return _empty_channels_last(like, (own_batch if batch is None else batch, *rest))


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

    def wanted(bit: int) -> bool:
        return bool(grad_mask & bit)

    return (
        _like_image(features, features) if wanted(FEATURES) else nothing,
        features.new_empty((batch, 2, height, width)) if wanted(OFFSETS) else nothing.clone(),
        _like_image(features, identity) if wanted(IDENTITY) and identity is not None else nothing.clone(),
        features.new_empty((batch, 2)) if wanted(ALPHA) and alpha is not None else nothing.clone(),
        _like_image(features, amplitude, batch) if wanted(AMPLITUDE) and amplitude is not None else nothing.clone(),
    )


for variant in ("deformable_sample", "deformable_sample_triton"):
    torch.library.register_fake(f"{NAMESPACE}::{variant}", deformable_sample)
    torch.library.register_fake(f"{NAMESPACE}::{variant}_backward", deformable_sample_backward)
