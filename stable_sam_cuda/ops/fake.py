"""Shapes, dtypes and strides of every op's results, for torch.compile and torch.export; no arithmetic.

Dense (B, C, H, W) results are channels-last, all others contiguous; both compiled and Triton kernels
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


def sampled_attention(
    query_rows: Tensor,
    features: Tensor,
    identity: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    key_pe: Tensor,
    max_offset: float,
) -> tuple[Tensor, Tensor]:
    sums_dtype = torch.promote_types(query_rows.dtype, torch.float32)
    return query_rows.new_empty(query_rows.shape), query_rows.new_empty(query_rows.shape[:2], dtype=sums_dtype)


def sampled_attention_backward(
    grad_pooled: Tensor,
    query_rows: Tensor,
    features: Tensor,
    identity: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    key_pe: Tensor,
    pooled: Tensor,
    logsumexp: Tensor,
    max_offset: float,
    grad_mask: int,
) -> tuple[Tensor, ...]:
    batch, height, width = query_rows.shape[0], *features.shape[2:]
    made = (
        lambda: query_rows.new_empty(query_rows.shape),
        lambda: _like_image(features, features),
        lambda: _like_image(features, identity),
        lambda: features.new_empty((batch, 2, height, width)),
        lambda: features.new_empty((batch, 2)),
        lambda: _like_image(features, key_pe),
    )
    return tuple(make() if grad_mask >> bit & 1 else features.new_empty((0,)) for bit, make in enumerate(made))


def offset_head(
    features: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor,
    eps: float,
) -> Tensor:
    batch, _, height, width = features.shape
    return features.new_empty((batch, 2, height, width))


def offset_head_backward(
    grad_output: Tensor,
    features: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor,
    eps: float,
    grad_mask: int,
) -> tuple[Tensor, ...]:
    parameters = (depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias)
    nothing = features.new_empty((0,))
    grad_features = _like_image(features, features) if grad_mask & 1 else nothing
    return (
        grad_features,
        *(
            parameter.new_empty(parameter.shape) if grad_mask >> bit & 1 else nothing.clone()
            for bit, parameter in enumerate(parameters, 1)
        ),
    )


for variant in ("deformable_sample", "deformable_sample_triton"):
    torch.library.register_fake(f"{NAMESPACE}::{variant}", deformable_sample)
    torch.library.register_fake(f"{NAMESPACE}::{variant}_backward", deformable_sample_backward)
for variant in ("sampled_attention", "sampled_attention_triton"):
    torch.library.register_fake(f"{NAMESPACE}::{variant}", sampled_attention)
    torch.library.register_fake(f"{NAMESPACE}::{variant}_backward", sampled_attention_backward)
for variant in ("offset_head", "offset_head_triton"):
    torch.library.register_fake(f"{NAMESPACE}::{variant}", offset_head)
    torch.library.register_fake(f"{NAMESPACE}::{variant}_backward", offset_head_backward)
