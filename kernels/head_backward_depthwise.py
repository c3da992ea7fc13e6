"""Gradients of a depthwise convolution: of its input, gathered, and of its taps, by partial sums of a fixed order."""

import triton
import triton.language as tl

from .head_tile import depthwise, groups_of, load_pixels, store_pixels, tile_groups
from .launch import NUMBERS, SMALL


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
    program = tl.program_id(0)
    tiles = groups_of(height, width, TILE_Y, TILE_GROUPS, COLUMNS)
    y, x = tile_groups(program % tiles, width, TILE_Y, TILE_GROUPS, COLUMNS)
    map_start = (program // tiles).to(tl.int64) * height * width * CHANNELS
    grad_hidden += map_start
    grad_features += map_start
    channel = tl.arange(0, CHANNEL_BLOCK)
    nothing = tl.zeros([TILE_Y * TILE_GROUPS, CHANNEL_BLOCK], tl.float32)
    sums = depthwise(
        grad_hidden, table, nothing, y, x, height, width, kernel_rows, channel, True, KERNEL_SIZE, CHANNELS, COLUMNS
    )
    for column in tl.static_range(COLUMNS):
        start = (y.to(tl.int64) * width + (x + column)) * CHANNELS
        inside = (y < height) & (x + column < width)
        store_pixels(grad_features, sums[column], start, inside, channel, CHANNELS)


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
    tiles = groups_of(height, width, TILE_Y, TILE_GROUPS, COLUMNS)
    sums = ()
    for _ in tl.static_range(ROWS_OF_TAPS * KERNEL_SIZE):
        sums = sums + (tl.zeros([TILE_Y * TILE_GROUPS, CHANNEL_BLOCK], tl.float32),)

    first = share * tiles_of_share
    for tile in range(first, tl.minimum(first + tiles_of_share, all_tiles)):
        y, x = tile_groups(tile % tiles, width, TILE_Y, TILE_GROUPS, COLUMNS)
        map_start = (tile // tiles).to(tl.int64) * height * width * CHANNELS
        start = map_start + (y.to(tl.int64) * width + x) * CHANNELS
        grads = ()
        for column in tl.static_range(COLUMNS):
            inside = (y < height) & (x + column < width)
            grads = grads + (load_pixels(grad_hidden, start + column * CHANNELS, inside, channel, CHANNELS),)
        for row in tl.static_range(ROWS_OF_TAPS):
            source_y = y + (first_row + row - RADIUS)
            in_rows = (source_y >= 0) & (source_y < height)
            start = map_start + (source_y.to(tl.int64) * width + x) * CHANNELS
            for i in tl.static_range(COLUMNS + KERNEL_SIZE - 1):
                source_x = x + (i - RADIUS)
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
