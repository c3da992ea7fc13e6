"""What the kernels of offset_head share: the depthwise convolution of a tile, the norm and GELU, in float32.

A tile is a set of groups of pixels that lie side by side, COLUMNS of them, and the pixels of a group are a tuple:
Triton cannot slice a tensor, but a tuple it can index, so a pixel that was read serves every sum of the group it
belongs to. The convolution then reads k (COLUMNS + k - 1) / COLUMNS pixels for each one it computes instead of k * k.
Axes in names and shapes: G groups, C channels, padded to a power of two.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """The groups of one tile and the map they lie on."""

    map_start: tl.tensor  # index of the map's first pixel among those of all prompts (int64)
    y: tl.tensor  # G rows (int32)
    x: tl.tensor  # G first columns (int32)
    height: tl.tensor
    width: tl.tensor


class Hidden(NamedTuple):
    """What stands between the features and the offsets, at the pixels of one tile."""

    columns: tl.tuple  # COLUMNS times (G, C) float32: the depthwise convolution
    norm_weight: tl.tensor  # (G, C) float32; likewise below
    norm_bias: tl.tensor
    weight_x: tl.tensor
    weight_y: tl.tensor


@triton.jit
def locate_tile(tile, height, width, TILE_Y: tl.constexpr, TILE_GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """A `Tile`, counted over the maps of all prompts."""
    tiles = tl.cdiv(height, TILE_Y) * tl.cdiv(width, TILE_GROUPS * COLUMNS)
    prompt = (tile // tiles).to(tl.int64)
    tile = tile % tiles
    tiles_x = tl.cdiv(width, TILE_GROUPS * COLUMNS)
    group = tl.arange(0, TILE_Y * TILE_GROUPS)
    y = (tile // tiles_x) * TILE_Y + group // TILE_GROUPS
    x = ((tile % tiles_x) * TILE_GROUPS + group % TILE_GROUPS) * COLUMNS
    return Tile(prompt * height * width, y, x, height, width)


@triton.jit
def pixels_of_column(tile, column):
    """Index on the map (int64) of one pixel of each group, and whether it lies inside."""
    x = tile.x + column
    return tile.y.to(tl.int64) * tile.width + x, (tile.y < tile.height) & (x < tile.width)


@triton.jit
def load_row(table, row, channel, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """One row of the parameters, (G, C) float32, the same for each group; 0 beyond the last channel.

    Repeated by the load itself, each thread has the channels of its pixels' channels. As a vector they would be spread
    over the threads in another way and pass through shared memory, with a barrier.
    """
    at = (row * CHANNELS + channel)[None, :] + tl.zeros([GROUPS, 1], tl.int32)
    return tl.load(table + at, mask=(channel < CHANNELS)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_pixels(image, start, inside, channel, CHANNELS: tl.constexpr):
    """(G, C) float32 of pixels whose channel 0 is at ``start``; 0 where not ``inside`` or beyond the channels."""
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(image + (start[:, None] + channel[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pixels(image, value, start, inside, channel, CHANNELS: tl.constexpr):
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    tl.store(image + (start[:, None] + channel[None, :]), value.to(image.dtype.element_ty), mask=mask)


@triton.jit
def find_hidden(
    features,  # [B, H, W, C]
    table,  # [k * k + 5, C]
    tile,
    kernel_rows,
    channel,
    KERNEL_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`Hidden` of a tile. The parameters after the convolution are loaded after it, when registers are free."""
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    GROUPS: tl.constexpr = tile.y.shape[0]
    bias = load_row(table, TAPS, channel, GROUPS, CHANNELS)
    image = features + tile.map_start * CHANNELS
    columns = depthwise(image, table, bias, tile, kernel_rows, channel, False, KERNEL_SIZE, CHANNELS, COLUMNS)
    norm_weight = load_row(table, TAPS + 1, channel, GROUPS, CHANNELS)
    norm_bias = load_row(table, TAPS + 2, channel, GROUPS, CHANNELS)
    weight_x = load_row(table, TAPS + 3, channel, GROUPS, CHANNELS)
    weight_y = load_row(table, TAPS + 4, channel, GROUPS, CHANNELS)
    return Hidden(columns, norm_weight, norm_bias, weight_x, weight_y)


@triton.jit
def depthwise(
    image,  # [H, W, C] of one prompt
    table,  # [k * k, C]
    bias,  # (G, C) float32
    tile,
    kernel_rows,
    channel,
    FLIPPED: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Depthwise convolution at the pixels of each group: a tuple of COLUMNS (G, C) tensors.

    FLIPPED takes the taps in reversed order: the transposed convolution. ``kernel_rows`` is KERNEL_SIZE as a number
    that the compiler does not know, for it would unroll the loop over rows and run out of registers.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    sums = ()
    for _ in tl.static_range(COLUMNS):
        sums = sums + (bias,)
    for row in range(0, kernel_rows):
        source_y = tile.y + (row - RADIUS)
        in_rows = (source_y >= 0) & (source_y < tile.height)
        start = (source_y.to(tl.int64) * tile.width + tile.x) * CHANNELS
        taps = ()
        for i in tl.static_range(COLUMNS + KERNEL_SIZE - 1):
            if i < KERNEL_SIZE:
                tap = row * KERNEL_SIZE + i
                if FLIPPED:
                    tap = KERNEL_SIZE * KERNEL_SIZE - 1 - tap
                taps = taps + (load_row(table, tap, channel, tile.y.shape[0], CHANNELS),)
            source_x = tile.x + (i - RADIUS)
            inside = in_rows & (source_x >= 0) & (source_x < tile.width)
            pixel = load_pixels(image, start + (i - RADIUS) * CHANNELS, inside, channel, CHANNELS)
            before = sums
            sums = ()
            for column in tl.static_range(COLUMNS):
                if i >= column and i - column < KERNEL_SIZE:
                    sums = sums + (before[column] + taps[i - column] * pixel,)
                else:
                    sums = sums + (before[column],)
    return sums


@triton.jit
def normalise(hidden, channel, eps, CHANNELS: tl.constexpr):
    """(hidden - mean) / sqrt(variance + eps) over the channels of each pixel, and that root's inverse."""
    mean = tl.sum(hidden, axis=1) * (1.0 / CHANNELS)
    centred = tl.where((channel < CHANNELS)[None, :], hidden - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) * (1.0 / CHANNELS)
    inverse = 1.0 / tl.sqrt(variance + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def normal_distribution(value):
    """The standard normal distribution function; GELU is the value times it."""
    return 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)
