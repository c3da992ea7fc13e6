"""Forward of deformable_sample: one program per 2-D tile of pixels, channels a cache line at a time.

Location and weights are computed once a tile and serve all its channel blocks. A square tile makes
neighbouring pixels meet each other's taps in L1, and programs are numbered prompt after prompt so that
the programs running at one time share a few prompts' features in L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, WARPS, channel_alignment, channel_block, launch, pixel_tile
from ..location import (
    batch_start,
    count_pixels,
    count_tiles,
    load_offsets,
    pixel_start,
    sample_axis,
    tap_starts,
    tile_pixels,
)
from ..shapes import empty_channels_last, prepare_sample

_LOADS = 4  # of each thread, for each tap and each block of channels
_FILLING_PROGRAMS = 512  # below this number of programs the channel blocks run in parallel, too


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def forward_kernel(
    output,  # [B, H, W, C]
    maps,
    alpha,  # [B, 2] or None
    channel_splits,
    AMPLITUDE_PER_CHANNEL: tl.constexpr,
    CHANNEL_ALIGNMENT: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    shape = maps.shape
    program = tl.program_id(0)
    split = program % channel_splits
    tiles = count_tiles(shape, TILE_Y, TILE_X)
    tile = (program // channel_splits) % tiles
    prompt = (program // channel_splits // tiles).to(tl.int64)

    y, x, inside = tile_pixels(tile, shape, TILE_Y, TILE_X)
    raw_x, raw_y = load_offsets(maps.offsets, prompt, y, x, inside, shape)
    cell_x, next_x, fraction_x, _ = sample_axis(x, raw_x, shape.max_offset, shape.width)
    cell_y, next_y, fraction_y, _ = sample_axis(y, raw_y, shape.max_offset, shape.height)

    sample_scale = tl.full([TILE_Y * TILE_X], 1.0, tl.float32)
    if maps.amplitude is not None:
        amplitude = maps.amplitude + batch_start(
            prompt, shape.amplitude_batch_stride, CHANNEL_ALIGNMENT if AMPLITUDE_PER_CHANNEL else 1
        )
        if not AMPLITUDE_PER_CHANNEL:
            sample_scale = tl.load(amplitude + y.to(tl.int64) * shape.width + x, mask=inside, other=0.0).to(tl.float32)
    if alpha is not None:
        alpha += prompt * 2
        sample_scale *= tl.load(alpha).to(tl.float32)

    features = maps.features + batch_start(prompt, shape.features_batch_stride, CHANNEL_ALIGNMENT)
    top_left, top_right, bottom_left, bottom_right = tap_starts(
        cell_y, next_y, cell_x, next_x, shape, CHANNEL_ALIGNMENT
    )
    weight_top_left = (sample_scale * (1.0 - fraction_y) * (1.0 - fraction_x))[:, None]
    weight_top_right = (sample_scale * (1.0 - fraction_y) * fraction_x)[:, None]
    weight_bottom_left = (sample_scale * fraction_y * (1.0 - fraction_x))[:, None]
    weight_bottom_right = (sample_scale * fraction_y * fraction_x)[:, None]

    own = pixel_start(y, x, shape, CHANNEL_ALIGNMENT)[:, None]
    pixels = count_pixels(shape)
    output += prompt * pixels * ((shape.channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT)
    if alpha is not None and maps.identity is not None:
        identity = maps.identity + batch_start(prompt, shape.identity_batch_stride, CHANNEL_ALIGNMENT)
        identity_scale = tl.load(alpha + 1).to(tl.float32)

    for start in range(split * CHANNEL_BLOCK, shape.channels, channel_splits * CHANNEL_BLOCK):
        channel = (start + tl.arange(0, CHANNEL_BLOCK))[None, :]
        mask = inside[:, None] & (channel < (shape.channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT)
        result = weight_top_left * tl.load(features + top_left + channel, mask=mask, other=0.0).to(tl.float32)
        result += weight_top_right * tl.load(features + top_right + channel, mask=mask, other=0.0).to(tl.float32)
        result += weight_bottom_left * tl.load(features + bottom_left + channel, mask=mask, other=0.0).to(tl.float32)
        result += weight_bottom_right * tl.load(features + bottom_right + channel, mask=mask, other=0.0).to(tl.float32)
        if AMPLITUDE_PER_CHANNEL:
            result *= tl.load(amplitude + own + channel, mask=mask, other=0.0).to(tl.float32)
        if alpha is not None and maps.identity is not None:
            passed = tl.load(identity + own + channel, mask=mask, other=0.0)
            result += identity_scale * passed.to(tl.float32)
        tl.store(output + own + channel, result.to(output.dtype.element_ty), mask=mask)


def deformable_sample(
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
) -> Tensor:
    """Triton's forward of the op in ops/; shapes as in ops/reference.py, checked by the caller.

    Raises TypeError for a dtype other than float32, float16 and bfloat16.
    """
    inputs = prepare_sample(features, offsets, identity, alpha, amplitude, max_offset)
    output = empty_channels_last(inputs.batch, features)
    if output.numel() == 0:
        return output

    block = channel_block(features)
    tile = pixel_tile(features, _LOADS)
    tiles = inputs.batch * inputs.maps.count_tiles(tile)
    channel_splits = triton.cdiv(inputs.maps.shape.channels, block) if tiles < _FILLING_PROGRAMS else 1
    launch(
        forward_kernel,
        tiles * channel_splits,
        output.device,
        output,
        inputs.maps,
        inputs.alpha,
        channel_splits,
        AMPLITUDE_PER_CHANNEL=inputs.amplitude_per_channel,
        CHANNEL_ALIGNMENT=channel_alignment(features),
        CHANNEL_BLOCK=block,
        TILE_Y=tile[0],
        TILE_X=tile[1],
        num_warps=WARPS,
    )
    return output
