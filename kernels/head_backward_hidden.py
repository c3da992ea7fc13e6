"""Gradient of offset_head by the depthwise convolution's output, from the hidden channels computed once more.

The gradients of all parameters but the taps are sums over pixels of what is in registers here. Each program walks over
a share of the tiles and leaves one partial sum of each; the caller adds them up in a fixed order.
"""

import triton
import triton.language as tl

from .head_tile import (
    depthwise,
    groups_of,
    load_row,
    normal_distribution,
    normalise,
    store_pixels,
    tile_groups,
)
from .launch import NUMBERS, SMALL


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
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    GROUPS: tl.constexpr = TILE_Y * TILE_GROUPS
    share = tl.program_id(0)
    tiles = groups_of(height, width, TILE_Y, TILE_GROUPS, COLUMNS)
    channel = tl.arange(0, CHANNEL_BLOCK)
    sum_bias = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_norm_weight = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_norm_bias = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_x = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    sum_y = tl.zeros([GROUPS, CHANNEL_BLOCK], tl.float32)
    first = share * tiles_of_share
    for tile in range(first, tl.minimum(first + tiles_of_share, all_tiles)):
        prompt = (tile // tiles).to(tl.int64)
        y, x = tile_groups(tile % tiles, width, TILE_Y, TILE_GROUPS, COLUMNS)
        map_start = prompt * height * width
        bias = load_row(table, TAPS, channel, GROUPS, CHANNELS)
        hidden = depthwise(
            features + map_start * CHANNELS,
            table,
            bias,
            y,
            x,
            height,
            width,
            kernel_rows,
            channel,
            False,
            KERNEL_SIZE,
            CHANNELS,
            COLUMNS,
        )
        # Loaded for each tile anew: registers are dearer here than reads from the cache.
        norm_weight = load_row(table, TAPS + 1, channel, GROUPS, CHANNELS)
        norm_bias = load_row(table, TAPS + 2, channel, GROUPS, CHANNELS)
        weight_x = load_row(table, TAPS + 3, channel, GROUPS, CHANNELS)
        weight_y = load_row(table, TAPS + 4, channel, GROUPS, CHANNELS)
        for column in tl.static_range(COLUMNS):
            pixel = y.to(tl.int64) * width + (x + column)
            inside = (y < height) & (x + column < width)
            grad_x = tl.load(grad_output + 2 * map_start + pixel, mask=inside, other=0.0).to(tl.float32)[:, None]
            grad_y = tl.load(grad_output + 2 * map_start + height * width + pixel, mask=inside, other=0.0)
            grad_y = grad_y.to(tl.float32)[:, None]
            normalised, inverse = normalise(hidden[column], channel, eps, CHANNELS)
            scaled = normalised * norm_weight + norm_bias
            below = normal_distribution(scaled)
            density = 0.3989422804014327 * tl.exp(-0.5 * scaled * scaled)
            # Beyond the last channel all weights are 0, and outside the map the incoming gradients are.
            grad_scaled = (grad_x * weight_x + grad_y * weight_y) * (below + scaled * density)
            grad_normalised = grad_scaled * norm_weight
            along = tl.sum(grad_normalised * normalised, axis=1) * (1.0 / CHANNELS)
            mean = tl.sum(grad_normalised, axis=1) * (1.0 / CHANNELS)
            grad = (grad_normalised - mean[:, None] - normalised * along[:, None]) * inverse[:, None]
            if grad_hidden is not None:
                start = (map_start + pixel) * CHANNELS
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
