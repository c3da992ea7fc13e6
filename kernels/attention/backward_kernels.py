"""Gradients of sampled_attention by the scores, by the calibrated features u and by the positional encoding.

The probabilities are computed again, tile by tile, from the inputs and the forward's logsumexp. One program per
prompt and share of the map, for one block of query rows, so that a pixel's gradient has one writer;
more blocks of rows add theirs in later launches.

The gradient of the query rows is a sum over all pixels, and its sums would take the registers that this kernel
needs. So the gradient of the scores is written, as the forward's kind of tile, for backward_rows to sum.
"""

import triton
import triton.language as tl

from ..launch import NUMBERS, SMALL
from ..location import batch_start, load_offsets, pixels_of, tile_pixels, tiles_of
from .tile import calibrated_chunk, dot, find_taps, load_chunk, store_chunk


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def attention_tiles_kernel(
    grad_scores,  # [B, tiles, P, R] or None where not asked for; likewise below
    grad_calibrated,  # [B, H, W, C]
    grad_key_pe,  # [B, H, W, C]
    grad_pooled,  # [B, R, C]
    logsumexp,  # [B, R] float32
    expected,  # [B, R] float32, grad_pooled . pooled
    query_rows,  # [B, R, C]
    features,  # [1 or B, H, W, C]
    identity,  # [1 or B, H, W, C]
    offsets,  # [1 or B, 2, H, W], any strides
    alpha,  # [B, 2]
    key_pe,  # [1 or B, H, W, C]
    shape,
    key_pe_batch_stride,
    max_offset,
    rows,
    first_row,
    splits,
    tiles_of_split,
    ADD: tl.constexpr,  # to what earlier blocks of rows have left
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
    LOG2_E: tl.constexpr = 1.4426950408889634
    dtype = features.dtype.element_ty
    share = tl.program_id(0)
    row = first_row + tl.arange(0, ROWS)
    is_row = row < rows
    prompt = (share // splits).to(tl.int64)
    image = prompt * pixels_of(shape) * CHANNELS
    query_rows += prompt * rows * CHANNELS
    grad_pooled += prompt * rows * CHANNELS
    features += batch_start(prompt, shape.features_batch_stride, CHANNELS)
    identity += batch_start(prompt, shape.identity_batch_stride, CHANNELS)
    key_pe += batch_start(prompt, key_pe_batch_stride, CHANNELS)
    alpha += prompt * 2
    sample_scale = tl.load(alpha).to(tl.float32)
    identity_scale = tl.load(alpha + 1).to(tl.float32)

    queries = ()
    grads = ()
    for k in tl.static_range(CHUNKS):
        channel = k * CHUNK + tl.arange(0, CHUNK)
        queries = queries + (load_chunk(query_rows, row, channel, is_row, CHANNELS, ALL_CHANNELS).to(dtype),)
        grads = grads + (load_chunk(grad_pooled, row, channel, is_row, CHANNELS, ALL_CHANNELS).to(dtype),)
    # A row that is none has probabilities of 0.
    level = tl.load(logsumexp + prompt * rows + row, mask=is_row, other=float("inf"))
    mean = tl.load(expected + prompt * rows + row, mask=is_row, other=0.0)

    first_tile = (share % splits) * tiles_of_split
    tiles = tiles_of(shape, TILE_Y, TILE_X)
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

        scores = tl.zeros([TILE_Y * TILE_X, ROWS], tl.float32)
        grad_probabilities = tl.zeros([TILE_Y * TILE_X, ROWS], tl.float32)
        for k in tl.static_range(CHUNKS):
            channel = k * CHUNK + tl.arange(0, CHUNK)
            calibrated = calibrated_chunk(
                features, identity, own, taps, weights, identity_scale, channel, inside, CHANNELS, ALL_CHANNELS
            )
            encoding = load_chunk(key_pe, own, channel, inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
            keys = (calibrated + encoding).to(dtype)
            scores = dot(keys, tl.trans(queries[k]), scores, PRECISION)
            grad_probabilities = dot(calibrated.to(dtype), tl.trans(grads[k]), grad_probabilities, PRECISION)

        # The largest logits round differently here than in the forward: no probability may exceed 1.
        # A comparison, not a minimum, so that NaN stays NaN.
        distance = scores - level[None, :]
        probabilities = tl.exp2(tl.where(distance > 0.0, 0.0, distance) * LOG2_E)
        probabilities = tl.where(inside[:, None], probabilities, 0.0)
        by_scores = (probabilities * (grad_probabilities - mean[None, :])).to(dtype)

        if grad_scores is not None:
            local = tl.arange(0, TILE_Y * TILE_X)
            at = ((prompt * tiles + tile) * (TILE_Y * TILE_X) + local) * rows
            tl.store(grad_scores + (at[:, None] + row[None, :]), by_scores, mask=is_row[None, :])
        if grad_calibrated is not None or grad_key_pe is not None:
            for k in tl.static_range(CHUNKS):
                channel = k * CHUNK + tl.arange(0, CHUNK)
                grad = dot(by_scores, queries[k], tl.zeros([TILE_Y * TILE_X, CHUNK], tl.float32), PRECISION)
                if grad_key_pe is not None:
                    by_keys = grad
                    if ADD:
                        by_keys += load_chunk(grad_key_pe + image, own, channel, inside, CHANNELS, ALL_CHANNELS)
                    store_chunk(grad_key_pe + image, by_keys, own, channel, inside, CHANNELS, ALL_CHANNELS)
                if grad_calibrated is not None:
                    grad = dot(probabilities.to(dtype), grads[k], grad, PRECISION)
                    if ADD:
                        grad += load_chunk(grad_calibrated + image, own, channel, inside, CHANNELS, ALL_CHANNELS)
                    store_chunk(grad_calibrated + image, grad, own, channel, inside, CHANNELS, ALL_CHANNELS)


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
