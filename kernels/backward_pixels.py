"""Gradients that belong to the output's own pixels: offsets, alpha, amplitude and (one prompt each) identity.

One pass over the incoming gradient: one program per 2-D tile of pixels, which it walks through a cache line of
channels at a time, as the forward does. The sums over channels stay in registers; alpha's sum over
pixels leaves one partial sum a tile, added up in fixed order by the caller.
"""

import triton
import triton.language as tl

from .launch import NUMBERS, SMALL
from .location import sample_axis
from .tiles import batch_start, load_offsets, pixel_start, pixels_of, tile_pixels, tiles_of


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def pixels_kernel(
    grad_offsets,  # [B, 2, H, W] or None where not asked for; likewise below
    grad_identity,  # [B, H, W, C]
    alpha_partials,  # [B, tiles, 2] float32
    grad_amplitude,  # [B, H, W, 1 or C]
    grad_output,  # [B, H, W, C]
    features,  # [1 or B, H, W, C]
    offsets,  # [1 or B, 2, H, W], any strides
    identity,  # [1 or B, H, W, C] or None
    alpha,  # [B, 2] or None
    amplitude,  # [1 or B, H, W, 1 or C] or None
    shape,
    max_offset,
    AMPLITUDE_PER_CHANNEL: tl.constexpr,
    CHANNEL_ALIGNMENT: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    NEEDS_SAMPLE: tl.constexpr = alpha_partials is not None or grad_amplitude is not None
    NEEDS_TAPS: tl.constexpr = NEEDS_SAMPLE or grad_offsets is not None
    program = tl.program_id(0)
    tiles = tiles_of(shape, TILE_Y, TILE_X)
    tile = program % tiles
    prompt = (program // tiles).to(tl.int64)
    pixels = pixels_of(shape)
    channels = (shape.channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT

    y, x, inside = tile_pixels(tile, shape, TILE_Y, TILE_X)
    own_pixel = y.to(tl.int64) * shape.width + x
    own = pixel_start(y, x, shape, CHANNEL_ALIGNMENT)[:, None]
    output_batch_start = prompt * pixels * channels
    grad_output += output_batch_start

    sample_scale = 1.0
    if alpha is not None:
        alpha += prompt * 2
        sample_scale = tl.load(alpha).to(tl.float32)
        if identity is not None:
            identity_scale = tl.load(alpha + 1).to(tl.float32)
    pixel_amplitude = tl.full([TILE_Y * TILE_X], 1.0, tl.float32)
    if amplitude is not None:
        amplitude += batch_start(
            prompt, shape.amplitude_batch_stride, CHANNEL_ALIGNMENT if AMPLITUDE_PER_CHANNEL else 1
        )
        if not AMPLITUDE_PER_CHANNEL:
            pixel_amplitude = tl.load(amplitude + own_pixel, mask=inside, other=0.0).to(tl.float32)
    if identity is not None:
        identity += batch_start(prompt, shape.identity_batch_stride, CHANNEL_ALIGNMENT)

    if NEEDS_TAPS:
        raw_x, raw_y = load_offsets(offsets, prompt, y, x, inside, shape)
        cell_x, next_x, fraction_x, slope_x = sample_axis(x, raw_x, max_offset, shape.width)
        cell_y, next_y, fraction_y, slope_y = sample_axis(y, raw_y, max_offset, shape.height)
        features += batch_start(prompt, shape.features_batch_stride, CHANNEL_ALIGNMENT)
        top_left = pixel_start(cell_y, cell_x, shape, CHANNEL_ALIGNMENT)[:, None]
        top_right = pixel_start(cell_y, next_x, shape, CHANNEL_ALIGNMENT)[:, None]
        bottom_left = pixel_start(next_y, cell_x, shape, CHANNEL_ALIGNMENT)[:, None]
        bottom_right = pixel_start(next_y, next_x, shape, CHANNEL_ALIGNMENT)[:, None]
        weight_y = fraction_y[:, None]
        weight_x = fraction_x[:, None]

    sum_x = tl.zeros([TILE_Y * TILE_X], tl.float32)
    sum_y = tl.zeros([TILE_Y * TILE_X], tl.float32)
    sum_sample = tl.zeros([TILE_Y * TILE_X], tl.float32)
    sum_identity = tl.zeros([TILE_Y * TILE_X], tl.float32)

    for start in range(0, shape.channels, CHANNEL_BLOCK):
        channel = (start + tl.arange(0, CHANNEL_BLOCK))[None, :]
        mask = inside[:, None] & (channel < channels)
        grad = tl.load(grad_output + own + channel, mask=mask, other=0.0).to(tl.float32)
        if grad_identity is not None:
            passed = (grad * identity_scale).to(grad_identity.dtype.element_ty)
            tl.store(grad_identity + output_batch_start + own + channel, passed, mask=mask)
        if alpha_partials is not None and identity is not None:
            passed = tl.load(identity + own + channel, mask=mask, other=0.0)
            sum_identity += tl.sum(grad * passed.to(tl.float32), axis=1)
        if NEEDS_TAPS:
            value_top_left = tl.load(features + top_left + channel, mask=mask, other=0.0).to(tl.float32)
            value_top_right = tl.load(features + top_right + channel, mask=mask, other=0.0).to(tl.float32)
            value_bottom_left = tl.load(features + bottom_left + channel, mask=mask, other=0.0).to(tl.float32)
            value_bottom_right = tl.load(features + bottom_right + channel, mask=mask, other=0.0).to(tl.float32)
            left_to_right_top = value_top_right - value_top_left
            left_to_right_bottom = value_bottom_right - value_bottom_left
            grad_sample = grad
            if AMPLITUDE_PER_CHANNEL:
                channel_amplitude = tl.load(amplitude + own + channel, mask=mask, other=0.0).to(tl.float32)
                grad_sample = grad * channel_amplitude
            top = value_top_left + weight_x * left_to_right_top
            bottom = value_bottom_left + weight_x * left_to_right_bottom
            if NEEDS_SAMPLE:
                sample = top + weight_y * (bottom - top)
                sum_sample += tl.sum(grad_sample * sample, axis=1)
                if AMPLITUDE_PER_CHANNEL and grad_amplitude is not None:
                    product = (grad * sample * sample_scale).to(grad_amplitude.dtype.element_ty)
                    tl.store(grad_amplitude + output_batch_start + own + channel, product, mask=mask)
            if grad_offsets is not None:
                by_x = left_to_right_top + weight_y * (left_to_right_bottom - left_to_right_top)
                sum_x += tl.sum(grad_sample * by_x, axis=1)
                sum_y += tl.sum(grad_sample * (bottom - top), axis=1)

    if grad_offsets is not None:
        scale = pixel_amplitude * sample_scale
        grad_offsets += prompt * 2 * pixels + own_pixel
        dtype = grad_offsets.dtype.element_ty
        tl.store(grad_offsets, (slope_x * scale * sum_x).to(dtype), mask=inside)
        tl.store(grad_offsets + pixels, (slope_y * scale * sum_y).to(dtype), mask=inside)
    if grad_amplitude is not None and not AMPLITUDE_PER_CHANNEL:
        product = (sum_sample * sample_scale).to(grad_amplitude.dtype.element_ty)
        tl.store(grad_amplitude + prompt * pixels + own_pixel, product, mask=inside)
    if alpha_partials is not None:
        alpha_partials += program.to(tl.int64) * 2
        tl.store(alpha_partials, tl.sum(tl.where(inside, pixel_amplitude * sum_sample, 0.0)))
        tl.store(alpha_partials + 1, tl.sum(sum_identity))
