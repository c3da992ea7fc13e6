"""Gradient of deformable_sample by its features.

It is a gather, so that it needs no atomics and is the same bit for bit every time.

Offsets are bounded, so a target pixel is sampled only from a window of (2 * radius + 1)^2 pixels, of
which about four really touch it. Testing a candidate must therefore cost little and must not touch its channels:

1. ``locations_kernel`` evaluates the tanh once a pixel: 8 bytes against the 2 KiB or so of its channels.
2. ``gather_kernel`` gives one warp a tile of 2 x 2 targets. It tests 32 candidates of each target at a
   time, one a lane, packs the outcome into one 32-bit word a target, and then walks the set bits: round i
   handles the i-th contributor of all four targets at once, 8 lanes a target, every channel of a lane in flight.

Contributors are added in the order of their position. Where the features of one picture serve many prompts, each share
of the prompts is summed by programs of its own, prompt after prompt, and the caller adds up the shares in their order.
The window is at most the map, so any max_offset is exact: it only costs more tests.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import (
    NUMBERS,
    SMALL,
    WARPS,
    channel_alignment,
    channel_block,
    device_of,
    launch,
    split_evenly,
)
from ..location import (
    batch_start,
    count_pixels,
    count_tiles,
    displace,
    load_offsets,
    pixel_start,
    tap_weight,
    tile_pixels,
    touches,
)
from ..shapes import SampleInputs, SampleShape, empty_channels_last

_LOCATIONS_TILE = (8, 32)
TARGETS_TILE = (2, 2)  # with 128 bytes of channels each, one warp of 16-byte loads
_CHANNELS_IN_REGISTERS = 256  # of each target, in the gather
_GATHERS = 16  # programs of the gather, of one warp each, that a multiprocessor runs at once


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def locations_kernel(
    locations,  # [1 or B, 2, H, W] float32: x plane, then y plane
    offsets,  # [1 or B, 2, H, W], any strides
    shape,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = count_tiles(shape, TILE_Y, TILE_X)
    prompt = (program // tiles).to(tl.int64)
    y, x, inside = tile_pixels(program % tiles, shape, TILE_Y, TILE_X)
    raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)
    location_x, _ = displace(x, raw_x, shape.max_offset, shape.width)
    location_y, _ = displace(y, raw_y, shape.max_offset, shape.height)
    pixels = count_pixels(shape)
    locations += prompt * 2 * pixels + y.to(tl.int64) * shape.width + x
    tl.store(locations, location_x, mask=inside)
    tl.store(locations + pixels, location_y, mask=inside)


@triton.jit
def _load_location(locations, y, x, valid, shape):
    pixel = locations + y.to(tl.int64) * shape.width + x
    outside = -2.0  # touches nothing
    location_x = tl.load(pixel, mask=valid, other=outside)
    location_y = tl.load(pixel + count_pixels(shape), mask=valid, other=outside)
    return location_y, location_x


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def gather_kernel(
    grad_features,  # [shares, H, W, C]
    grad_output,  # [B, H, W, C]
    locations,  # [1 or B, 2, H, W] float32
    alpha,  # [B, 2] or None
    amplitude,  # [1 or B, H, W, 1 or C] or None
    shape,
    locations_batch_stride,
    prompts,
    prompts_of_share,  # 1 where each prompt has features of its own
    window_height,
    radius,
    WINDOW_WIDTH: tl.constexpr,
    AMPLITUDE_PER_CHANNEL: tl.constexpr,
    CHANNEL_ALIGNMENT: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    TARGETS: tl.constexpr = TILE_Y * TILE_X
    CANDIDATES: tl.constexpr = 32  # one bit of a word each
    program = tl.program_id(0)
    channels = (shape.channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT
    channel_groups = tl.cdiv(shape.channels, CHANNEL_BLOCKS * CHANNEL_BLOCK)
    group = program % channel_groups
    tiles = count_tiles(shape, TILE_Y, TILE_X)
    tile = (program // channel_groups) % tiles
    share = (program // channel_groups // tiles).to(tl.int64)
    pixels = count_pixels(shape)

    y, x, inside = tile_pixels(tile, shape, TILE_Y, TILE_X)
    # Shifted to lie inside the map, the window still holds every pixel within the radius.
    window_y = tl.maximum(tl.minimum(y - radius, shape.height - window_height), 0)
    window_x = tl.maximum(tl.minimum(x - radius, shape.width - WINDOW_WIDTH), 0)
    bit = tl.arange(0, CANDIDATES)[:, None]

    # The block axis comes first so that lanes spread over channels and then over targets: each lane
    # serves one target and holds all the blocks of it.
    block = tl.arange(0, CHANNEL_BLOCKS)[:, None, None]
    channel = tl.arange(0, CHANNEL_BLOCK)[None, None, :]
    channel = (group * CHANNEL_BLOCKS + block) * CHANNEL_BLOCK + channel
    in_channels = channel < channels
    total = tl.zeros([CHANNEL_BLOCKS, TARGETS, CHANNEL_BLOCK], tl.float32)

    first_prompt = share * prompts_of_share
    for prompt in range(first_prompt, tl.minimum(first_prompt + prompts_of_share, prompts)):
        prompt_locations = locations + prompt * locations_batch_stride
        prompt_grad = grad_output + prompt * pixels * channels
        scale = 1.0
        if alpha is not None:
            scale = tl.load(alpha + prompt * 2).to(tl.float32)

        for first in range(0, window_height * WINDOW_WIDTH, CANDIDATES):
            candidate = first + bit
            candidate_y = window_y[None, :] + candidate // WINDOW_WIDTH
            candidate_x = window_x[None, :] + candidate % WINDOW_WIDTH
            valid = inside[None, :] & (candidate < window_height * WINDOW_WIDTH)
            sampled_y, sampled_x = _load_location(prompt_locations, candidate_y, candidate_x, valid, shape)
            contributes = touches(sampled_y, candidate_y, y[None, :]) & touches(sampled_x, candidate_x, x[None, :])
            pending = tl.sum(contributes.to(tl.uint32) << bit.to(tl.uint32), axis=0)
            rounds = tl.max(tl.sum(contributes.to(tl.int32), axis=0), axis=0)

            for _ in range(0, rounds):
                rest = pending & (pending - 1)
                # The index of the lowest set bit is the exponent of its value in float32; negative for no bit.
                lowest = (pending ^ rest).to(tl.float32).to(tl.int32, bitcast=True)
                contributor = first + (lowest >> 23) - 127
                found = pending != 0
                pending = rest
                source_y = window_y + contributor // WINDOW_WIDTH
                source_x = window_x + contributor % WINDOW_WIDTH
                location_y, location_x = _load_location(prompt_locations, source_y, source_x, found, shape)
                weight = scale * tap_weight(location_y, location_x, y, x)
                if amplitude is not None and not AMPLITUDE_PER_CHANNEL:
                    at = amplitude + prompt * shape.amplitude_batch_stride
                    at += source_y.to(tl.int64) * shape.width + source_x
                    weight *= tl.load(at, mask=found, other=0.0).to(tl.float32)
                weight = tl.where(found, weight, 0.0)
                source = pixel_start(source_y, source_x, shape, CHANNEL_ALIGNMENT)[None, :, None] + channel
                mask = found[None, :, None] & in_channels
                grad = tl.load(prompt_grad + source, mask=mask, other=0.0).to(tl.float32)
                if AMPLITUDE_PER_CHANNEL:
                    at = amplitude + batch_start(prompt, shape.amplitude_batch_stride, CHANNEL_ALIGNMENT)
                    grad *= tl.load(at + source, mask=mask, other=0.0).to(tl.float32)
                total += weight[None, :, None] * grad

    own = pixel_start(y, x, shape, CHANNEL_ALIGNMENT)[None, :, None] + channel
    grad_features += share * pixels * channels
    mask = inside[None, :, None] & in_channels
    tl.store(grad_features + own, total.to(grad_features.dtype.element_ty), mask=mask)


def gather_radius(shape: SampleShape) -> int:
    """How far a target can lie from a pixel that samples it, no farther than the map goes.

    At least 1, because a NaN location has the next pixel among its taps whatever the maximal offset.
    """
    return max(1, math.ceil(min(abs(shape.max_offset), max(shape.height, shape.width))))


def fill_features_gradient(grad_features: Tensor, grad_output: Tensor, inputs: SampleInputs) -> None:
    """Fill (1 or B, C, H, W); summed over prompts where the features' batch of 1 was broadcast."""
    device, maps, shape = grad_output.device, inputs.maps, inputs.maps.shape
    offsets_batch = maps.offsets.shape[0]
    locations = torch.empty((offsets_batch, 2, shape.height, shape.width), dtype=torch.float32, device=device)
    launch(
        locations_kernel,
        offsets_batch * maps.count_tiles(_LOCATIONS_TILE),
        device,
        locations,
        maps.offsets,
        shape,
        TILE_Y=_LOCATIONS_TILE[0],
        TILE_X=_LOCATIONS_TILE[1],
        num_warps=WARPS,
    )
    block = channel_block(maps.features)
    blocks = min(_CHANNELS_IN_REGISTERS // block, triton.next_power_of_2(triton.cdiv(shape.channels, block)))
    channel_groups = triton.cdiv(shape.channels, block * blocks)
    radius = gather_radius(shape)
    programs = maps.count_tiles(TARGETS_TILE) * channel_groups
    shares, prompts_of_share, sums = inputs.batch, 1, grad_features
    if grad_features.shape[0] < inputs.batch:
        shares, prompts_of_share = split_evenly(programs, inputs.batch, _GATHERS, device_of(grad_output))
        sums = empty_channels_last(shares, grad_features, torch.float32)
    launch(
        gather_kernel,
        shares * programs,
        device,
        sums,
        grad_output,
        locations,
        inputs.alpha,
        maps.amplitude,
        shape,
        0 if offsets_batch == 1 else locations[0].numel(),
        inputs.batch,
        prompts_of_share,
        min(2 * radius + 1, shape.height),
        radius,
        WINDOW_WIDTH=min(2 * radius + 1, shape.width),
        AMPLITUDE_PER_CHANNEL=inputs.amplitude_per_channel,
        CHANNEL_ALIGNMENT=channel_alignment(maps.features),
        CHANNEL_BLOCK=block,
        CHANNEL_BLOCKS=blocks,
        TILE_Y=TARGETS_TILE[0],
        TILE_X=TARGETS_TILE[1],
        num_warps=1,
    )
    if sums is not grad_features:
        grad_features.copy_(sums.sum(0, keepdim=True))
