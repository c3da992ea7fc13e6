"""The two kernels of sampled_attention's backward, and their launches.

The probabilities are computed again, tile by tile, from the inputs and the forward's logsumexp. The gradient of the
query rows is a sum over all pixels, and its sums would take the registers that the first kernel needs. So that writes
the gradient of the scores, by tiles, and the second sums it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, device_of, launch, split_evenly
from ..location import count_pixels
from ..shapes import AttentionInputs
from .plan import AttentionPlan
from .tile import (
    dot,
    keys_and_values,
    load_chunk,
    load_raw_offsets,
    locate_tile,
    maps_of_prompt,
    store_chunk,
    tiles_of_share,
)


class Incoming(NamedTuple):
    """What the forward and the op after it have left, of the prompts at hand."""

    grad_pooled: Tensor  # [B, R, C]
    logsumexp: Tensor  # [B, R] float32
    expected: Tensor  # [B, R] float32, grad_pooled . pooled


@triton.jit
def scores_of_tile(tile, row, rows, PIXELS: tl.constexpr):
    """Where (P, R) scores of a tile lie in [B, tiles, P, R]; ``tile`` (int64) counts those of all prompts."""
    start = (tile * PIXELS + tl.arange(0, PIXELS)) * rows
    return start[:, None] + row[None, :]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def attention_tiles_kernel(
    grad_scores,  # [B, tiles, P, R] or None where not asked for; likewise below
    grad_calibrated,  # [B, H, W, C]
    grad_key_pe,  # [B, H, W, C]
    grad_pooled,  # [B, R, C]
    logsumexp,  # [B, R] float32
    expected,  # [B, R] float32, grad_pooled . pooled
    query_rows,  # [B, R, C]
    maps,
    alpha,  # [B, 2]
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
    """Gradients by the scores, by the calibrated features u and by the positional encoding.

    One program per prompt and share of the map, for one block of query rows, so that a pixel's gradient has one
    writer; more blocks of rows add theirs in later launches.
    """
    CHUNKS: tl.constexpr = (CHANNELS + CHUNK - 1) // CHUNK
    ALL_CHANNELS: tl.constexpr = CHUNK * CHUNKS == CHANNELS
    LOG2_E: tl.constexpr = 1.4426950408889634
    dtype = maps.features.dtype.element_ty
    share = tl.program_id(0)
    row = first_row + tl.arange(0, ROWS)
    is_row = row < rows
    prompt = (share // splits).to(tl.int64)
    image = prompt * count_pixels(maps.shape) * CHANNELS
    query_rows += prompt * rows * CHANNELS
    grad_pooled += prompt * rows * CHANNELS
    maps = maps_of_prompt(maps, alpha, prompt, CHANNELS)

    queries = ()
    grads = ()
    for k in tl.static_range(CHUNKS):
        channel = k * CHUNK + tl.arange(0, CHUNK)
        queries = queries + (load_chunk(query_rows, row, channel, is_row, CHANNELS, ALL_CHANNELS).to(dtype),)
        grads = grads + (load_chunk(grad_pooled, row, channel, is_row, CHANNELS, ALL_CHANNELS).to(dtype),)
    # A row that is none has probabilities of 0.
    level = tl.load(logsumexp + prompt * rows + row, mask=is_row, other=float("inf"))
    mean = tl.load(expected + prompt * rows + row, mask=is_row, other=0.0)

    first_tile, last_tile, tiles = tiles_of_share(share, maps.shape, splits, tiles_of_split, TILE_Y, TILE_X)
    raw_offsets = ()
    if OFFSETS_AHEAD:
        raw_offsets = load_raw_offsets(maps, first_tile, TILE_Y, TILE_X)
    for tile in range(first_tile, last_tile):
        pixels = locate_tile(maps, tile, raw_offsets, TILE_Y, TILE_X, OFFSETS_AHEAD)
        if OFFSETS_AHEAD:
            raw_offsets = load_raw_offsets(maps, tile + 1, TILE_Y, TILE_X)

        scores = tl.zeros([TILE_Y * TILE_X, ROWS], tl.float32)
        grad_probabilities = tl.zeros([TILE_Y * TILE_X, ROWS], tl.float32)
        for k in tl.static_range(CHUNKS):
            channel = k * CHUNK + tl.arange(0, CHUNK)
            keys, values = keys_and_values(maps, pixels, channel, CHANNELS, ALL_CHANNELS)
            scores = dot(keys, tl.trans(queries[k]), scores, PRECISION)
            grad_probabilities = dot(values.to(dtype), tl.trans(grads[k]), grad_probabilities, PRECISION)

        # The largest logits round differently here than in the forward: no probability may exceed 1.
        # A comparison, not a minimum, so that NaN stays NaN.
        distance = scores - level[None, :]
        probabilities = tl.exp2(tl.where(distance > 0.0, 0.0, distance) * LOG2_E)
        probabilities = tl.where(pixels.inside[:, None], probabilities, 0.0)
        by_scores = (probabilities * (grad_probabilities - mean[None, :])).to(dtype)

        if grad_scores is not None:
            at = scores_of_tile(prompt * tiles + tile, row, rows, TILE_Y * TILE_X)
            tl.store(grad_scores + at, by_scores, mask=is_row[None, :])
        if grad_calibrated is not None or grad_key_pe is not None:
            own, inside = pixels.pixel, pixels.inside
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
    maps,
    alpha,  # [B, 2]
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
    """Gradient by the query rows: the sum over pixels of the scores' gradient times the keys.

    The keys are blended again, a chunk at a time, and go straight into the matrix units. One program per prompt, block
    of rows and share of the map; the sums of the shares are added up in a fixed order by the launch.
    """
    CHUNKS: tl.constexpr = (CHANNELS + CHUNK - 1) // CHUNK
    ALL_CHANNELS: tl.constexpr = CHUNK * CHUNKS == CHANNELS
    program = tl.program_id(0)
    row = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    share = program // row_blocks  # of one prompt's map
    prompt = (share // splits).to(tl.int64)
    maps = maps_of_prompt(maps, alpha, prompt, CHANNELS)

    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros([CHUNK, ROWS], tl.float32),)
    first_tile, last_tile, tiles = tiles_of_share(share, maps.shape, splits, tiles_of_split, TILE_Y, TILE_X)
    raw_offsets = ()
    if OFFSETS_AHEAD:
        raw_offsets = load_raw_offsets(maps, first_tile, TILE_Y, TILE_X)
    for tile in range(first_tile, last_tile):
        pixels = locate_tile(maps, tile, raw_offsets, TILE_Y, TILE_X, OFFSETS_AHEAD)
        if OFFSETS_AHEAD:
            raw_offsets = load_raw_offsets(maps, tile + 1, TILE_Y, TILE_X)
        at = scores_of_tile(prompt * tiles + tile, row, rows, TILE_Y * TILE_X)
        by_scores = tl.load(grad_scores + at, mask=is_row[None, :], other=0.0)

        earlier = sums
        sums = ()
        for k in tl.static_range(CHUNKS):
            channel = k * CHUNK + tl.arange(0, CHUNK)
            keys, _values = keys_and_values(maps, pixels, channel, CHANNELS, ALL_CHANNELS)
            sums = sums + (dot(tl.trans(keys), by_scores, earlier[k], PRECISION),)

    grad_query_rows += share.to(tl.int64) * rows * CHANNELS
    for k in tl.static_range(CHUNKS):
        channel = k * CHUNK + tl.arange(0, CHUNK)
        store_chunk(grad_query_rows, tl.trans(sums[k]), row, channel, is_row, CHANNELS, ALL_CHANNELS)


def grad_of_scores(
    plan: AttentionPlan,
    inputs: AttentionInputs,
    incoming: Incoming,
    grad_scores: Tensor | None,
    grad_calibrated: Tensor | None,
    grad_key_pe: Tensor | None,
) -> None:
    """Fill those gradients that are given."""
    batch, rows, channels = inputs.query_rows.shape
    device = inputs.query_rows.device
    tiles = inputs.maps.count_tiles(plan.tile)
    splits, tiles_of_split = split_evenly(batch, tiles, plan.resident, device_of(inputs.query_rows))
    for first_row in range(0, rows, plan.rows):
        launch(
            attention_tiles_kernel,
            batch * splits,
            device,
            grad_scores,
            grad_calibrated,
            grad_key_pe,
            *incoming,
            *inputs,
            rows,
            first_row,
            splits,
            tiles_of_split,
            ADD=first_row > 0,
            CHANNELS=channels,
            **plan.constants,
        )


def grad_of_rows(plan: AttentionPlan, inputs: AttentionInputs, grad_query_rows: Tensor, grad_scores: Tensor) -> None:
    """Fill ``grad_query_rows``."""
    batch, rows, channels = inputs.query_rows.shape
    row_blocks = triton.cdiv(rows, plan.rows)
    tiles = inputs.maps.count_tiles(plan.tile)
    splits, tiles_of_split = split_evenly(batch * row_blocks, tiles, plan.resident, device_of(grad_query_rows))
    sums = grad_query_rows
    if splits > 1:
        sums = grad_query_rows.new_empty((batch, splits, rows, channels), dtype=torch.float32)
    launch(
        attention_rows_kernel,
        batch * splits * row_blocks,
        grad_query_rows.device,
        sums,
        grad_scores,
        inputs.maps,
        inputs.alpha,
        rows,
        row_blocks,
        splits,
        tiles_of_split,
        CHANNELS=channels,
        **plan.constants,
    )
    if splits > 1:
        grad_query_rows.copy_(sums.sum(1))
