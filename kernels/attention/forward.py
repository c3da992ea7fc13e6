"""Forward of sampled_attention: absorbed attention over calibrated features that are never written to memory.

One program per prompt, block of query rows and share of the map. It walks over its tiles of pixels with a running
softmax: a tile's u is blended once, gives the scores (keys times rows) and is then what the weights average.
Where prompts are few the map is shared among programs; `merge_kernel` joins their results in a fixed order.

Pixels, and then channels, are the long side of the products, query rows the short one; tile.dot says why.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, WARPS, device_of, fitting_plans, launch, run_best, split_evenly
from ..shapes import AttentionInputs, prepare_attention
from .plan import ROWS_KERNEL, TILES_KERNEL, AttentionPlan, forward_plans, plan_name, rows_plans, tiles_plans
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

_SPLITS_AT_A_TIME = 16  # of the merge


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def attention_kernel(
    pooled,  # [B, splits, R, C]
    logsumexp,  # [B, splits, R] float32
    query_rows,  # [B, R, C]
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
    CHUNKS: tl.constexpr = (CHANNELS + CHUNK - 1) // CHUNK
    ALL_CHANNELS: tl.constexpr = CHUNK * CHUNKS == CHANNELS
    LOG2_E: tl.constexpr = 1.4426950408889634
    dtype = maps.features.dtype.element_ty
    program = tl.program_id(0)
    row = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    share = program // row_blocks  # of one prompt's map
    prompt = (share // splits).to(tl.int64)
    query_rows += prompt * rows * CHANNELS
    maps = maps_of_prompt(maps, alpha, prompt, CHANNELS)

    queries = ()
    averages = ()
    for k in tl.static_range(CHUNKS):
        channel = k * CHUNK + tl.arange(0, CHUNK)
        query = load_chunk(query_rows, row, channel, is_row, CHANNELS, ALL_CHANNELS).to(dtype)
        queries = queries + (tl.trans(query),)
        averages = averages + (tl.zeros([CHUNK, ROWS], tl.float32),)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    first_tile, last_tile, _tiles = tiles_of_share(share, maps.shape, splits, tiles_of_split, TILE_Y, TILE_X)
    raw_offsets = ()
    if OFFSETS_AHEAD:
        raw_offsets = load_raw_offsets(maps, first_tile, TILE_Y, TILE_X)
    for tile in range(first_tile, last_tile):
        pixels = locate_tile(maps, tile, raw_offsets, TILE_Y, TILE_X, OFFSETS_AHEAD)

        values = ()
        scores = tl.zeros([TILE_Y * TILE_X, ROWS], tl.float32)
        for k in tl.static_range(CHUNKS):
            channel = k * CHUNK + tl.arange(0, CHUNK)
            keys, value = keys_and_values(maps, pixels, channel, CHANNELS, ALL_CHANNELS)
            scores = dot(keys, queries[k], scores, PRECISION)
            values = values + (value.to(dtype),)
        scores = tl.where(pixels.inside[:, None], scores, float("-inf"))
        if OFFSETS_AHEAD:
            raw_offsets = load_raw_offsets(maps, tile + 1, TILE_Y, TILE_X)

        higher = tl.maximum(highest, tl.max(scores, axis=0))
        # Scores of -inf alone must not give the NaN of inf - inf. Subtracting before scaling keeps
        # the largest scores finite.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        probabilities = tl.exp2((scores - level[None, :]) * LOG2_E)
        fading = tl.exp2((highest - level) * LOG2_E)
        total = total * fading + tl.sum(probabilities, axis=0)
        highest = higher
        faded = averages
        averages = ()
        for k in tl.static_range(CHUNKS):
            kept = faded[k] * fading[None, :]
            averages = averages + (dot(tl.trans(values[k]), probabilities.to(dtype), kept, PRECISION),)

    pooled += share.to(tl.int64) * rows * CHANNELS
    logsumexp += share.to(tl.int64) * rows
    tl.store(logsumexp + row, highest + tl.log(total), mask=is_row)
    for k in tl.static_range(CHUNKS):
        channel = k * CHUNK + tl.arange(0, CHUNK)
        store_chunk(pooled, tl.trans(averages[k] / total[None, :]), row, channel, is_row, CHANNELS, ALL_CHANNELS)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def merge_kernel(
    pooled,  # [B, R, C]
    logsumexp,  # [B, R] float32
    pooled_parts,  # [B, splits, R, C] float32
    logsumexp_parts,  # [B, splits, R] float32
    rows,
    splits,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row, prompt = program % rows, (program // rows).to(tl.int64)
    channel = tl.arange(0, CHANNEL_BLOCK)
    pooled_parts += (prompt * splits * rows + row) * CHANNELS
    logsumexp_parts += prompt * splits * rows + row

    highest = float("-inf")
    for first in range(0, splits, SPLIT_BLOCK):
        split = first + tl.arange(0, SPLIT_BLOCK)
        part = tl.load(logsumexp_parts + split * rows, mask=split < splits, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(part, axis=0))
    level = tl.where(highest == float("-inf"), 0.0, highest)
    total = 0.0
    result = tl.zeros([CHANNEL_BLOCK], tl.float32)
    for first in range(0, splits, SPLIT_BLOCK):
        split = first + tl.arange(0, SPLIT_BLOCK)
        part = tl.load(logsumexp_parts + split * rows, mask=split < splits, other=float("-inf"))
        weight = tl.exp(part - level)
        total += tl.sum(weight, axis=0)
        mask = (split < splits)[:, None] & (channel < CHANNELS)[None, :]
        start = split.to(tl.int64) * rows * CHANNELS
        value = tl.load(pooled_parts + (start[:, None] + channel[None, :]), mask=mask, other=0.0)
        # A share whose scores all lie infinitely lower has a weight of 0, whatever its average.
        result += tl.sum(tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * value), axis=0)
    at = prompt * rows + row
    tl.store(logsumexp + at, highest + tl.log(total))
    result = (result / total).to(pooled.dtype.element_ty)
    tl.store(pooled + at * CHANNELS + channel, result, mask=channel < CHANNELS)


def sampled_attention(
    query_rows: Tensor,
    features: Tensor,
    identity: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    key_pe: Tensor,
    max_offset: float,
) -> tuple[Tensor, Tensor]:
    """Triton's forward of the op in ops/; shapes as in ops/reference.py, checked by the caller.

    Raises TypeError for a dtype other than float32, float16 and bfloat16, and `NoPlanFitsError` as `run_best`.
    """
    inputs = prepare_attention(query_rows, features, identity, offsets, alpha, key_pe, max_offset)
    batch, rows, channels = query_rows.shape
    pooled = query_rows.new_empty((batch, rows, channels))
    logsumexp = query_rows.new_empty((batch, rows), dtype=torch.float32)
    if inputs.maps.pixels == 0 or channels == 0 or logsumexp.numel() == 0:
        return _without_scores(pooled, logsumexp, inputs)
    dtype = features.dtype
    sizes = (dtype, channels, rows, device_of(pooled))
    for kernel, plans in ((TILES_KERNEL, tiles_plans(*sizes)), (ROWS_KERNEL, rows_plans(*sizes))):
        fitting_plans(plan_name(kernel, dtype, channels), plans, pooled)  # both directions or none
    name = plan_name("sampled_attention", dtype, channels)
    run_best(name, forward_plans(*sizes), pooled, lambda plan: _attend(pooled, logsumexp, inputs, plan))
    return pooled, logsumexp


def _attend(pooled: Tensor, logsumexp: Tensor, inputs: AttentionInputs, plan: AttentionPlan) -> None:
    """Fill both results."""
    batch, rows, channels = pooled.shape
    row_blocks = triton.cdiv(rows, plan.rows)
    tiles = inputs.maps.count_tiles(plan.tile)
    splits, tiles_of_split = split_evenly(batch * row_blocks, tiles, plan.resident, device_of(pooled))
    pooled_parts, logsumexp_parts = pooled, logsumexp
    if splits > 1:
        pooled_parts = logsumexp.new_empty((batch, splits, rows, channels))
        logsumexp_parts = logsumexp.new_empty((batch, splits, rows))
    launch(
        attention_kernel,
        batch * splits * row_blocks,
        pooled.device,
        pooled_parts,
        logsumexp_parts,
        *inputs,
        rows,
        row_blocks,
        splits,
        tiles_of_split,
        CHANNELS=channels,
        **plan.constants,
    )
    if splits > 1:
        launch(
            merge_kernel,
            batch * rows,
            pooled.device,
            pooled,
            logsumexp,
            pooled_parts,
            logsumexp_parts,
            rows,
            splits,
            CHANNELS=channels,
            CHANNEL_BLOCK=triton.next_power_of_2(channels),
            SPLIT_BLOCK=_SPLITS_AT_A_TIME,
            num_warps=WARPS,
        )


def _without_scores(pooled: Tensor, logsumexp: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """A softmax over nothing, or over scores that are all 0 because there are no channels."""
    lowest = math.log(inputs.maps.pixels) if inputs.maps.pixels else -math.inf
    return pooled.zero_(), logsumexp.fill_(lowest)
