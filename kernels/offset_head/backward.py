"""Backward of offset_head: by recomputation, a few prompts at a time.

One temporary of the features' size is written, the gradient by the depthwise convolution's output: both of the
convolution's gradients need it at k * k places, and the norm over all channels stands before it, so computing it anew
at each place would cost k * k forwards. It is never that of all prompts, and small enough to be read from the cache.
Nothing is added atomically and every sum has a fixed order, so the result is the same bit for bit in each run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, device_of, launch, split_evenly, tile_count
from ..shapes import HeadInputs, HeadParameters, empty_channels_last, prepare_head, split_table
from .plan import head_plan, hidden_plan, rows_of_taps, taps_plan
from .tile import (
    depthwise,
    find_hidden,
    load_pixels,
    locate_tile,
    normal_distribution,
    normalise,
    pixels_of_column,
    store_pixels,
)

BYTES_AT_A_TIME = 32 << 20  # of the temporary: fills the device, and stays in the cache of a large one
FEATURES, DEPTHWISE_WEIGHT, POINTWISE_BIAS = 0, 1, 6  # bits of grad_mask


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def offset_head_hidden_kernel(
    grad_hidden,  # [B, H, W, C] or None where not asked for
    partials,  # [shares, 5, C] float32 or None: depthwise bias, norm's weight and bias, pointwise weights
    grad_output,  # [B, 2, H, W]
    features,  # [B, H, W, C]
    table,  # [k * k + 5, C]
    height,
    width,
    kernel_rows,  # k
    eps,
    all_tiles,  # of all prompts
    tiles_of_share,
    KERNEL_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient by the depthwise convolution's output, from the hidden channels computed once more.

    The gradients of all parameters but the taps are sums over pixels of what is in registers here. Each program walks
    over a share of the tiles and leaves one partial sum of each; the launch adds them up in a fixed order.
    """
    GROUPS: tl.constexpr = TILE_Y * TILE_GROUPS
    share = tl.program_id(0)
    channel = tl.arange(0, CHANNEL_BLOCK)
    sum_bias = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_norm_weight = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_norm_bias = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_x = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_y = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    first = share * tiles_of_share
    for index in range(first, tl.minimum(first + tiles_of_share, all_tiles)):
        tile = locate_tile(index, height, width, TILE_Y, TILE_GROUPS, COLUMNS)
        # Its parameters are loaded for each tile anew: registers are dearer here than reads from the cache.
        hidden = find_hidden(features, table, tile, kernel_rows, channel, KERNEL_SIZE, CHANNELS, COLUMNS)
        for column in tl.static_range(COLUMNS):
            pixel, inside = pixels_of_column(tile, column)
            grad_pixel = grad_output + 2 * tile.map_start + pixel
            grad_x = tl.load(grad_pixel, mask=inside, other=0.0).to(tl.float32)[:, None]
            grad_y = tl.load(grad_pixel + height * width, mask=inside, other=0.0).to(tl.float32)[:, None]
            normalised, inverse = normalise(hidden.columns[column], channel, eps, CHANNELS)
            scaled = normalised * hidden.norm_weight + hidden.norm_bias
            below = normal_distribution(scaled)
            density = 0.3989422804014327 * tl.exp(-0.5 * scaled * scaled)
            # Beyond the last channel all weights are 0, and outside the map the incoming gradients are.
            grad_scaled = (grad_x * hidden.weight_x + grad_y * hidden.weight_y) * (below + scaled * density)
            grad_normalised = grad_scaled * hidden.norm_weight
            along = tl.sum(grad_normalised * normalised, axis=1) * (1.0 / CHANNELS)
            mean = tl.sum(grad_normalised, axis=1) * (1.0 / CHANNELS)
            grad = (grad_normalised - mean[:, None] - normalised * along[:, None]) * inverse[:, None]
            if grad_hidden is not None:
                start = (tile.map_start + pixel) * CHANNELS
                store_pixels(grad_hidden, grad, start, inside, channel, CHANNELS)
            if partials is not None:
                sum_bias += grad
                sum_norm_weight += grad_scaled * normalised
                sum_norm_bias += grad_scaled
                activated = scaled * below
                sum_x += grad_x * activated
                sum_y += grad_y * activated
    if partials is not None:
        at = partials + share.to(tl.int64) * 5 * CHANNELS + channel
        is_channel = channel < CHANNELS
        tl.store(at, tl.sum(sum_bias, axis=0), mask=is_channel)
        tl.store(at + CHANNELS, tl.sum(sum_norm_weight, axis=0), mask=is_channel)
        tl.store(at + 2 * CHANNELS, tl.sum(sum_norm_bias, axis=0), mask=is_channel)
        tl.store(at + 3 * CHANNELS, tl.sum(sum_x, axis=0), mask=is_channel)
        tl.store(at + 4 * CHANNELS, tl.sum(sum_y, axis=0), mask=is_channel)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def offset_head_features_kernel(
    grad_features,  # [B, H, W, C]
    grad_hidden,  # [B, H, W, C]
    table,  # [k * k + 5, C]
    height,
    width,
    kernel_rows,  # k
    KERNEL_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The transposed convolution, as the convolution with its taps reversed: one program per tile of pixels."""
    tile = locate_tile(tl.program_id(0), height, width, TILE_Y, TILE_GROUPS, COLUMNS)
    grad_hidden += tile.map_start * CHANNELS
    grad_features += tile.map_start * CHANNELS
    channel = tl.arange(0, CHANNEL_BLOCK)
    nothing = tl.zeros([TILE_Y * TILE_GROUPS, CHANNEL_BLOCK], tl.float32)
    sums = depthwise(grad_hidden, table, nothing, tile, kernel_rows, channel, True, KERNEL_SIZE, CHANNELS, COLUMNS)
    for column in tl.static_range(COLUMNS):
        pixel, inside = pixels_of_column(tile, column)
        store_pixels(grad_features, sums[column], pixel * CHANNELS, inside, channel, CHANNELS)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def offset_head_taps_kernel(
    partials,  # [shares, k * k, C] float32
    grad_hidden,  # [B, H, W, C]
    features,  # [B, H, W, C]
    height,
    width,
    all_tiles,  # of all prompts
    tiles_of_share,
    channel_blocks,
    row_blocks,
    KERNEL_SIZE: tl.constexpr,
    ROWS_OF_TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per share of the tiles, block of channels and block of rows of taps."""
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    program = tl.program_id(0)
    channel = (program % channel_blocks) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    first_row = (program // channel_blocks % row_blocks) * ROWS_OF_TAPS
    share = program // channel_blocks // row_blocks
    sums = ()
    for _ in tl.static_range(ROWS_OF_TAPS * KERNEL_SIZE):
        sums = sums + (tl.zeros([TILE_Y * TILE_GROUPS, CHANNEL_BLOCK], tl.float32),)

    first = share * tiles_of_share
    for index in range(first, tl.minimum(first + tiles_of_share, all_tiles)):
        tile = locate_tile(index, height, width, TILE_Y, TILE_GROUPS, COLUMNS)
        map_start = tile.map_start * CHANNELS
        start = map_start + (tile.y.to(tl.int64) * width + tile.x) * CHANNELS
        grads = ()
        for column in tl.static_range(COLUMNS):
            inside = (tile.y < height) & (tile.x + column < width)
            grads = grads + (load_pixels(grad_hidden, start + column * CHANNELS, inside, channel, CHANNELS),)
        for row in tl.static_range(ROWS_OF_TAPS):
            source_y = tile.y + (first_row + row - RADIUS)
            in_rows = (source_y >= 0) & (source_y < height)
            start = map_start + (source_y.to(tl.int64) * width + tile.x) * CHANNELS
            for i in tl.static_range(COLUMNS + KERNEL_SIZE - 1):
                source_x = tile.x + (i - RADIUS)
                inside = in_rows & (source_x >= 0) & (source_x < width)
                pixel = load_pixels(features, start + (i - RADIUS) * CHANNELS, inside, channel, CHANNELS)
                before = sums
                sums = ()
                for tap in tl.static_range(ROWS_OF_TAPS * KERNEL_SIZE):
                    # The pixel at i lies under this tap of the column i - tap, counted from the tap's own row.
                    if tap // KERNEL_SIZE == row and i >= tap % KERNEL_SIZE and i - tap % KERNEL_SIZE < COLUMNS:
                        sums = sums + (before[tap] + grads[i - tap % KERNEL_SIZE] * pixel,)
                    else:
                        sums = sums + (before[tap],)

    taps = KERNEL_SIZE * KERNEL_SIZE
    for tap in tl.static_range(ROWS_OF_TAPS * KERNEL_SIZE):
        index = first_row * KERNEL_SIZE + tap
        at = partials + (share.to(tl.int64) * taps + index) * CHANNELS + channel
        tl.store(at, tl.sum(sums[tap], axis=0), mask=(channel < CHANNELS) & (index < taps))


def _grad_of_hidden(
    grad_hidden: Tensor | None, with_sums: bool, grad_output: Tensor, inputs: HeadInputs
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
        *inputs.sizes,
        inputs.eps,
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
        *inputs.sizes,
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


def _grad_of_table(grad_features: Tensor | None, wanted: list[bool], grad_output: Tensor, inputs: HeadInputs) -> Tensor:
    """Fill the features' gradient if it is given; the table's gradient, where asked for."""
    taps = inputs.kernel_size**2
    total = torch.zeros_like(inputs.table, dtype=torch.float32)
    with_taps, with_sums = wanted[DEPTHWISE_WEIGHT], any(wanted[DEPTHWISE_WEIGHT + 1 : POINTWISE_BIAS])
    with_hidden = grad_features is not None or with_taps
    batch = inputs.features.shape[0]
    together = max(1, min(batch, BYTES_AT_A_TIME // inputs.features[0].nbytes))
    for first in range(0, batch, together):
        prompts = slice(first, min(first + together, batch))
        group = inputs._replace(features=inputs.features[prompts])
        grad_hidden = empty_channels_last(group.features.shape[0], group.features) if with_hidden else None
        sums = _grad_of_hidden(grad_hidden, with_sums, grad_output[prompts], group)
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
    """Triton's backward of the op in ops/, where shapes and (in register.py) ``grad_mask`` are explained.

    Raises TypeError for a dtype other than float32, float16 and bfloat16.
    """
    parameters = HeadParameters(
        depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias
    )
    inputs = prepare_head(features, parameters, eps)
    wanted = [bool(grad_mask >> bit & 1) for bit in range(7)]
    grad_features = empty_channels_last(features.shape[0], inputs.features) if wanted[FEATURES] else None
    total = torch.zeros_like(inputs.table, dtype=torch.float32)
    grad_output = grad_output.contiguous()
    if features.numel() > 0 and any(wanted[:POINTWISE_BIAS]):
        total = _grad_of_table(grad_features, wanted, grad_output, inputs)
    gradients = [
        *split_table(total, inputs.kernel_size),
        grad_output.sum((0, 2, 3), dtype=torch.float32) if wanted[POINTWISE_BIAS] else None,
    ]
    return (
        features.new_empty(0) if grad_features is None else grad_features,
        *(
            # A copy even in float32: gradients share no memory with each other.
            gradient.to(features.dtype, memory_format=torch.contiguous_format, copy=True)
            if is_wanted
            else features.new_empty(0)
            for gradient, is_wanted in zip(gradients, wanted[1:], strict=True)
        ),
    )
