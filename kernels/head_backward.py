"""Backward of offset_head: by recomputation, a few prompts at a time.

One temporary of the features' size is written, the gradient by the depthwise convolution's output: both of the
convolution's gradients need it at k * k places, and the norm over all channels stands before it, so computing it anew
at each place would cost k * k forwards. It is never that of all prompts, and small enough to be read from the cache.
Nothing is added atomically and every sum has a fixed order, so the result is the same bit for bit in each run.
"""

import torch
import triton
from torch import Tensor

from .head_backward_depthwise import offset_head_features_kernel, offset_head_taps_kernel
from .head_backward_hidden import offset_head_hidden_kernel
from .head_plan import HeadInputs, head_plan, hidden_plan, prepare_head, rows_of_taps, split_table, taps_plan
from .launch import device_of, launch, split_evenly, tile_count
from .sampling_shape import empty_channels_last

_BYTES_AT_A_TIME = 32 << 20  # of the temporary: fills the device, and stays in the cache of a large one
FEATURES, DEPTHWISE_WEIGHT, POINTWISE_BIAS = 0, 1, 6  # bits of grad_mask


def _grad_of_hidden(
    grad_hidden: Tensor | None, with_sums: bool, grad_output: Tensor, inputs: HeadInputs, eps: float
) -> Tensor | None:
    """Fill the gradient if it is given; the sums (5, C) of the parameters beyond the taps if asked for."""
    batch, channels, height, width = inputs.features.shape
    plan = hidden_plan(channels)
    tiles = batch * tile_count(height, width, plan.tile)
    shares, tiles_of_share = split_evenly(1, tiles, plan.resident, device_of(inputs.features))
    partials = inputs.table.new_empty((shares, 5, channels), dtype=torch.float32) if with_sums else None
    launch(
        offset_head_hidden_kernel,
        shares,
        inputs.features.device,
        grad_hidden,
        partials,
        grad_output,
        inputs.features,
        inputs.table,
        height,
        width,
        inputs.kernel_size,
        eps,
        tiles,
        tiles_of_share,
        KERNEL_SIZE=inputs.kernel_size,
        CHANNELS=channels,
        **plan.constants,
    )
    return None if partials is None else partials.sum(0)


def _grad_of_features(grad_features: Tensor, grad_hidden: Tensor, inputs: HeadInputs) -> None:
    batch, channels, height, width = grad_features.shape
    plan = head_plan(channels)
    launch(
        offset_head_features_kernel,
        batch * tile_count(height, width, plan.tile),
        grad_features.device,
        grad_features,
        grad_hidden,
        inputs.table,
        height,
        width,
        inputs.kernel_size,
        KERNEL_SIZE=inputs.kernel_size,
        CHANNELS=channels,
        **plan.constants,
    )


def _grad_of_taps(grad_hidden: Tensor, inputs: HeadInputs) -> Tensor:
    """The sums (k * k, C) over the pixels of these prompts."""
    batch, channels, height, width = grad_hidden.shape
    size = inputs.kernel_size
    plan, rows = taps_plan(channels, size), rows_of_taps(size)
    channel_blocks, row_blocks = triton.cdiv(channels, plan.channel_block), triton.cdiv(size, rows)
    tiles = batch * tile_count(height, width, plan.tile)
    blocks = channel_blocks * row_blocks
    shares, tiles_of_share = split_evenly(blocks, tiles, plan.resident, device_of(grad_hidden))
    partials = inputs.table.new_empty((shares, size * size, channels), dtype=torch.float32)
    launch(
        offset_head_taps_kernel,
        shares * blocks,
        grad_hidden.device,
        partials,
        grad_hidden,
        inputs.features,
        height,
        width,
        tiles,
        tiles_of_share,
        channel_blocks,
        row_blocks,
        KERNEL_SIZE=size,
        ROWS_OF_TAPS=rows,
        CHANNELS=channels,
        **plan.constants,
    )
    return partials.sum(0)


def _grad_of_table(
    grad_features: Tensor | None, wanted: list[bool], grad_output: Tensor, inputs: HeadInputs, eps: float
) -> Tensor:
    """Fill the features' gradient if it is given; the table's gradient, where asked for."""
    taps = inputs.kernel_size**2
    total = torch.zeros_like(inputs.table, dtype=torch.float32)
    with_taps, with_sums = wanted[DEPTHWISE_WEIGHT], any(wanted[DEPTHWISE_WEIGHT + 1 : POINTWISE_BIAS])
    with_hidden = grad_features is not None or with_taps
    batch = inputs.features.shape[0]
    together = max(1, min(batch, _BYTES_AT_A_TIME // inputs.features[0].nbytes))
    for first in range(0, batch, together):
        prompts = slice(first, min(first + together, batch))
        group = inputs._replace(features=inputs.features[prompts])
        grad_hidden = empty_channels_last(group.features.shape[0], group.features) if with_hidden else None
        sums = _grad_of_hidden(grad_hidden, with_sums, grad_output[prompts], group, eps)
        if sums is not None:
            total[taps:] += sums
        if grad_features is not None:
            _grad_of_features(grad_features[prompts], grad_hidden, group)
        if with_taps:
            total[:taps] += _grad_of_taps(grad_hidden, group)
    return total


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
    """Triton's backward of the op in ops/schema.py, where shapes and ``grad_mask`` are explained.

    Raises TypeError for a dtype other than float32, float16 and bfloat16.
    """
    parameters = (depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias)
    inputs = prepare_head(features, *parameters)
    wanted = [bool(grad_mask >> bit & 1) for bit in range(7)]
    grad_features = empty_channels_last(features.shape[0], inputs.features) if wanted[FEATURES] else None
    total = torch.zeros_like(inputs.table, dtype=torch.float32)
    grad_output = grad_output.contiguous()
    if features.numel() > 0 and any(wanted[:POINTWISE_BIAS]):
        total = _grad_of_table(grad_features, wanted, grad_output, inputs, float(eps))
    gradients = [
        *split_table(total, inputs.kernel_size),
        grad_output.sum((0, 2, 3), dtype=torch.float32) if wanted[POINTWISE_BIAS] else None,
    ]
    return (
        features.new_empty(0) if grad_features is None else grad_features,
        *(
            # A copy even in float32: gradients share no memory with each other.
            gradient.to(features.dtype, memory_format=torch.contiguous_format, copy=True)
            if asked
            else features.new_empty(0)
            for gradient, asked in zip(gradients, wanted[1:], strict=True)
        ),
    )
