"""Forward of sampled_attention: absorbed attention over calibrated features that are never written to memory.

One program per prompt, block of query rows and share of the map. It walks over its tiles of pixels with a running
softmax: a tile's u is blended once, gives the scores (keys times rows) and is then what the weights average.
Where prompts are few the map is shared among programs; `_merge_kernel` joins their results in a fixed order.

Pixels, and then channels, are the long side of the products, query rows the short one; attention_tile.dot says why.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, WARPS, device_of, fitting_plans, launch, run_best, split_evenly, tile_count
from ..location import batch_start, load_offsets, tile_pixels, tiles_of
from ..shapes import AttentionInputs, prepare_attention
from .plan import ROWS_KERNEL, TILES_KERNEL, AttentionPlan, forward_plans, plan_name, rows_plans, tiles_plans
from .tile import calibrated_chunk, dot, find_taps, load_chunk, store_chunk

_SPLITS_AT_A_TIME = 16  # of the merge


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def _attention_kernel(
    pooled,  # [B, splits, R, C]
    logsumexp,  # [B, splits, R] float32
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
    dtype = features.dtype.element_ty
    program = tl.program_id(0)
    row = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    share = program // row_blocks  # of one prompt's map
    prompt = (share // splits).to(tl.int64)
    query_rows += prompt * rows * CHANNELS
    features += batch_start(prompt, shape.features_batch_stride, CHANNELS)
    identity += batch_start(prompt, shape.identity_batch_stride, CHANNELS)
    key_pe += batch_start(prompt, key_pe_batch_stride, CHANNELS)
    alpha += prompt * 2
    sample_scale = tl.load(alpha).to(tl.float32)
    identity_scale = tl.load(alpha + 1).to(tl.float32)

    queries = ()
    averages = ()
    for k in tl.static_range(CHUNKS):
        channel = k * CHUNK + tl.arange(0, CHUNK)
        query = load_chunk(query_rows, row, channel, is_row, CHANNELS, ALL_CHANNELS).to(dtype)
        queries = queries + (tl.trans(query),)
        averages = averages + (tl.zeros([CHUNK, ROWS], tl.float32),)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    first_tile = (share % splits) * tiles_of_split
    last_tile = tl.minimum(first_tile + tiles_of_split, tiles_of(shape, TILE_Y, TILE_X))
    if OFFSETS_AHEAD:
        y, x, inside = tile_pixels(first_tile, shape, TILE_Y, TILE_X)
        raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)
    for tile in range(first_tile, last_tile):
        y, x, inside = tile_pixels(tile, shape, TILE_Y, TILE_X)
        own = y * shape.width + x
        if not OFFSETS_AHEAD:
            raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)
        taps, weights = find_taps(raw_x, raw_y, y, x, sample_scale, max_offset, shape)

        values = ()
        scores = tl.zeros([TILE_Y * TILE_X, ROWS], tl.float32)
        for k in tl.static_range(CHUNKS):
            channel = k * CHUNK + tl.arange(0, CHUNK)
            calibrated = calibrated_chunk(
                features, identity, own, taps, weights, identity_scale, channel, inside, CHANNELS, ALL_CHANNELS
            )
            encoding = load_chunk(key_pe, own, channel, inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
            keys = (calibrated + encoding).to(dtype)
            scores = dot(keys, queries[k], scores, PRECISION)
            values = values + (calibrated.to(dtype),)
        scores = tl.where(inside[:, None], scores, float("-inf"))
        if OFFSETS_AHEAD:
            y, x, inside = tile_pixels(tile + 1, shape, TILE_Y, TILE_X)
            raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)

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
def _merge_kernel(
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
    """Triton's forward of the op in ops/schema.py; shapes as in ops/reference.py, checked by the caller.

    Raises TypeError for a dtype other than float32, float16 and bfloat16, and `NoPlanFitsError` as `run_best`.
    """
    inputs = prepare_attention(query_rows, features, identity, offsets, alpha, key_pe)
    batch, rows, channels = query_rows.shape
    pooled = query_rows.new_empty((batch, rows, channels))
    logsumexp = query_rows.new_empty((batch, rows), dtype=torch.float32)
    if inputs.pixels == 0 or channels == 0 or logsumexp.numel() == 0:
        return _without_scores(pooled, logsumexp, inputs)
    dtype = inputs.features.dtype
    sizes = (dtype, channels, rows, device_of(pooled))
    for kernel, plans in ((TILES_KERNEL, tiles_plans(*sizes)), (ROWS_KERNEL, rows_plans(*sizes))):
        fitting_plans(plan_name(kernel, dtype, channels), plans, pooled)  # both directions or none
    name = plan_name("sampled_attention", dtype, channels)
    run_best(name, forward_plans(*sizes), pooled, lambda plan: _attend(pooled, logsumexp, inputs, max_offset, plan))
    return pooled, logsumexp


def _attend(pooled: Tensor, logsumexp: Tensor, inputs: AttentionInputs, max_offset: float, plan: AttentionPlan) -> None:
    """Fill both results."""
    batch, rows, channels = pooled.shape
    row_blocks = triton.cdiv(rows, plan.rows)
    tiles = tile_count(inputs.shape.height, inputs.shape.width, plan.tile)
    splits, tiles_of_split = split_evenly(batch * row_blocks, tiles, plan.resident, device_of(pooled))
    pooled_parts, logsumexp_parts = pooled, logsumexp
    if splits > 1:
        pooled_parts = logsumexp.new_empty((batch, splits, rows, channels))
        logsumexp_parts = logsumexp.new_empty((batch, splits, rows))
    launch(
        _attention_kernel,
        batch * splits * row_blocks,
        pooled.device,
        pooled_parts,
        logsumexp_parts,
        inputs.query_rows,
        inputs.features,
        inputs.identity,
        inputs.offsets,
        inputs.alpha,
        inputs.key_pe,
        inputs.shape,
        inputs.key_pe_batch_stride,
        float(max_offset),
        rows,
        row_blocks,
        splits,
        tiles_of_split,
        CHANNELS=channels,
        **plan.constants,
    )
    if splits > 1:
        launch(
            _merge_kernel,
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
    lowest = math.log(inputs.pixels) if inputs.pixels else -math.inf
    return pooled.zero_(), logsumexp.fill_(lowest)
