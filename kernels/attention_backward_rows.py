"""Gradient of sampled_attention by its query rows: the sum over pixels of the scores' gradient times the keys.

The keys are blended again, a chunk at a time, and go straight into the matrix units. One program per prompt, block
of rows and share of the map; the sums of the shares are added up in a fixed order by the caller.
"""

import triton
import triton.language as tl

from .attention_tile import calibrated_chunk, dot, find_taps, load_chunk, store_chunk
from .launch import NUMBERS, SMALL
from .tiles import batch_start, load_offsets, tile_pixels, tiles_of


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def attention_rows_kernel(
    grad_query_rows,  # [B, splits, R, C]
    grad_scores,  # [B, tiles, P, R]
    features,  # [1 or B, H, W, C]
    identity,  # [1 or B, H, W, C]
    offsets,  # [1 or B, 2, H, W], any strides
    alpha,  # [B, 2]
    key_pe,  # [1 or B, H, W, C]
    shape,
    key_pe_batch_stride,
    max_offset,
    rows,
    row_blocks,
    splits,
    tiles_of_split,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    OFFSETS_AHEAD: tl.constexpr,
):
    CHUNKS: tl.constexpr = (CHANNELS + CHUNK - 1) // CHUNK
    ALL_CHANNELS: tl.constexpr = CHUNK * CHUNKS == CHANNELS
    dtype = features.dtype.element_ty
    program = tl.program_id(0)
    row = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    share = program // row_blocks  # of one prompt's map
    prompt = (share // splits).to(tl.int64)
    features += batch_start(prompt, shape.features_batch_stride, CHANNELS)
    identity += batch_start(prompt, shape.identity_batch_stride, CHANNELS)
    key_pe += batch_start(prompt, key_pe_batch_stride, CHANNELS)
    alpha += prompt * 2
    sample_scale = tl.load(alpha).to(tl.float32)
    identity_scale = tl.load(alpha + 1).to(tl.float32)

    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros([CHUNK, ROWS], tl.float32),)
    tiles = tiles_of(shape, TILE_Y, TILE_X)
    first_tile = (share % splits) * tiles_of_split
    last_tile = tl.minimum(first_tile + tiles_of_split, tiles)
    if OFFSETS_AHEAD:
        y, x, inside = tile_pixels(first_tile, shape, TILE_Y, TILE_X)
        raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)
    for tile in range(first_tile, last_tile):
        y, x, inside = tile_pixels(tile, shape, TILE_Y, TILE_X)
        own = y * shape.width + x
        if not OFFSETS_AHEAD:
            raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)
        taps, weights = find_taps(raw_x, raw_y, y, x, sample_scale, max_offset, shape)
        if OFFSETS_AHEAD:
            next_y, next_x, next_inside = tile_pixels(tile + 1, shape, TILE_Y, TILE_X)
            raw_x, raw_y = load_offsets(offsets, prompt, next_y, next_x, next_inside, shape)
        local = tl.arange(0, TILE_Y * TILE_X)
        at = ((prompt * tiles + tile) * (TILE_Y * TILE_X) + local) * rows
        by_scores = tl.load(grad_scores + (at[:, None] + row[None, :]), mask=is_row[None, :], other=0.0)

        earlier = sums
        sums = ()
        for k in tl.static_range(CHUNKS):
            channel = k * CHUNK + tl.arange(0, CHUNK)
            calibrated = calibrated_chunk(
                features, identity, own, taps, weights, identity_scale, channel, inside, CHANNELS, ALL_CHANNELS
            )
            encoding = load_chunk(key_pe, own, channel, inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
            keys = (calibrated + encoding).to(dtype)
            sums = sums + (dot(tl.trans(keys), by_scores, earlier[k], PRECISION),)

    grad_query_rows += share.to(tl.int64) * rows * CHANNELS
    for k in tl.static_range(CHUNKS):
        channel = k * CHUNK + tl.arange(0, CHUNK)
        store_chunk(grad_query_rows, tl.trans(sums[k]), row, channel, is_row, CHANNELS, ALL_CHANNELS)
