"""Forward of deformable_sample: one program per 2-D tile of pixels, channels a cache line at a time.

Location and weights are computed once a tile and serve all its channel blocks. A square tile makes
neighbouring pixels meet each other's taps in L1, and programs are numbered prompt after prompt so that
the programs running at one time share a few prompts' features in L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, WARPS, channel_alignment, channel_block, launch, pixel_tile, tile_count
from ..location import batch_start, load_offsets, pixel_start, pixels_of, sample_axis, tile_pixels, tiles_of
from ..shapes import empty_channels_last, prepare_inputs

_LOADS = 4  # of each thread, for each tap and each block of channels
_FILLING_PROGRAMS = 512  # below this number of programs the channel blocks run in parallel, too


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def _forward_kernel(
    output,  # [B, H, W, C]
    features,  # [1 or B, H, W, C]
    offsets,  # [1 or B, 2, H, W], any strides
    identity,  # [1 or B, H, W, C] or None
    alpha,  # [B, 2] or None
    amplitude,  # [1 or B, H, W, 1 or C] or None
    shape,
    max_offset,
    channel_splits,
    AMPLITUDE_PER_CHANNEL: tl.constexpr,
    CHANNEL_ALIGNMENT: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % channel_splits
    tiles = tiles_of(shape, TILE_Y, TILE_X)
    tile = (program // channel_splits) % tiles
    prompt = (program // channel_splits // tiles).to(tl.int64)

    y, x, inside = tile_pixels(tile, shape, TILE_Y, TILE_X)
    raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)
    cell_x, next_x, fraction_x, _ = sample_axis(x, raw_x, max_offset, shape.width)
    cell_y, next_y, fraction_y, _ = sample_axis(y, raw_y, max_offset, shape.height)

    sample_scale = tl.full([TILE_Y * TILE_X], 1.0, tl.float32)
    if amplitude is not None:
        amplitude += batch_start(
            prompt, shape.amplitude_batch_stride, CHANNEL_ALIGNMENT if AMPLITUDE_PER_CHANNEL else 1
        )
        if not AMPLITUDE_PER_CHANNEL:
            sample_scale = tl.load(amplitude + y.to(tl.int64) * shape.width + x, mask=inside, other=0.0).to(tl.float32)
    if alpha is not None:
        alpha += prompt * 2
        sample_scale *= tl.load(alpha).to(tl.float32)

    features += batch_start(prompt, shape.features_batch_stride, CHANNEL_ALIGNMENT)
    top_left = pixel_start(cell_y, cell_x, shape, CHANNEL_ALIGNMENT)[:, None]
    top_right = pixel_start(cell_y, next_x, shape, CHANNEL_ALIGNMENT)[:, None]
    bottom_left = pixel_start(next_y, cell_x, shape, CHANNEL_ALIGNMENT)[:, None]
    bottom_right = pixel_start(next_y, next_x, shape, CHANNEL_ALIGNMENT)[:, None]
    weight_top_left = (sample_scale * (1.0 - fraction_y) * (1.0 - fraction_x))[:, None]
    weight_top_right = (sample_scale * (1.0 - fraction_y) * fraction_x)[:, None]
    weight_bottom_left = (sample_scale * fraction_y * (1.0 - fraction_x))[:, None]
    weight_bottom_right = (sample_scale * fraction_y * fraction_x)[:, None]

    own = pixel_start(y, x, shape, CHANNEL_ALIGNMENT)[:, None]
    pixels = pixels_of(shape)
    output += prompt * pixels * ((shape.channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT)
    if alpha is not None and identity is not None:
        identity += batch_start(prompt, shape.identity_batch_stride, CHANNEL_ALIGNMENT)
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
        if alpha is not None and identity is not None:
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
    """Triton's forward of the op in ops/schema.py; shapes as in ops/reference.py, checked by the caller.

    Raises TypeError for a dtype other than float32, float16 and bfloat16.
    """
    inputs = prepare_inputs(features, offsets, identity, alpha, amplitude)
    output = empty_channels_last(inputs.batch, inputs.features)
    if output.numel() == 0:
        return output

    block = channel_block(inputs.features)
    tile = pixel_tile(inputs.features, _LOADS)
    tiles = inputs.batch * tile_count(inputs.shape.height, inputs.shape.width, tile)
    channel_splits = triton.cdiv(inputs.shape.channels, block) if tiles < _FILLING_PROGRAMS else 1
    launch(
        _forward_kernel,
        tiles * channel_splits,
        output.device,
        output,
        inputs.features,
        inputs.offsets,
        inputs.identity,
        inputs.alpha,
        inputs.amplitude,
        inputs.shape,
        float(max_offset),
        channel_splits,
        AMPLITUDE_PER_CHANNEL=inputs.amplitude_channels > 1,
        CHANNEL_ALIGNMENT=channel_alignment(inputs.features),
        CHANNEL_BLOCK=block,
        TILE_Y=tile[0],
        TILE_X=tile[1],
        num_warps=WARPS,
    )
    return output
