"""Backward of deformable_sample. The kernels here fill gradients of the output's own pixels; gather.py, the features'.

Nothing is kept from the forward but its inputs. Every kernel gathers and every sum has a fixed order,
so the result is the same bit for bit in each run, asked for or not.
"""

import torch
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
from ..shapes import SampleInputs, channels_last, empty_channels_last, prepare_sample
from .gather import fill_features_gradient

_PIXELS_LOADS = 2  # of each thread, for each tensor and each block of channels
_IDENTITY_BLOCK = 1024


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def pixels_kernel(
    grad_offsets,  # [B, 2, H, W] or None where not asked for; likewise below
    grad_identity,  # [B, H, W, C]
    alpha_partials,  # [B, tiles, 2] float32
    grad_amplitude,  # [B, H, W, 1 or C]
    grad_output,  # [B, H, W, C]
    maps,
    alpha,  # [B, 2] or None
    AMPLITUDE_PER_CHANNEL: tl.constexpr,
    CHANNEL_ALIGNMENT: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Gradients by offsets, alpha, amplitude and (one prompt each) identity.

    One pass over the incoming gradient: one program per 2-D tile of pixels, which it walks through a cache line of
    channels at a time, as the forward does. The sums over channels stay in registers; alpha's sum over pixels leaves
    one partial sum a tile, added up in fixed order by the launch.
    """
    NEEDS_SAMPLE: tl.constexpr = alpha_partials is not None or grad_amplitude is not None
    NEEDS_TAPS: tl.constexpr = NEEDS_SAMPLE or grad_offsets is not None
    shape = maps.shape
    program = tl.program_id(0)
    tiles = count_tiles(shape, TILE_Y, TILE_X)
    tile = program % tiles
    prompt = (program // tiles).to(tl.int64)
    pixels = count_pixels(shape)
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
        if maps.identity is not None:
            identity_scale = tl.load(alpha + 1).to(tl.float32)
    pixel_amplitude = tl.full([TILE_Y * TILE_X], 1.0, tl.float32)
    if maps.amplitude is not None:
        amplitude = maps.amplitude + batch_start(
            prompt, shape.amplitude_batch_stride, CHANNEL_ALIGNMENT if AMPLITUDE_PER_CHANNEL else 1
        )
        if not AMPLITUDE_PER_CHANNEL:
            pixel_amplitude = tl.load(amplitude + own_pixel, mask=inside, other=0.0).to(tl.float32)
    if maps.identity is not None:
        identity = maps.identity + batch_start(prompt, shape.identity_batch_stride, CHANNEL_ALIGNMENT)

    if NEEDS_TAPS:
        raw_x, raw_y = load_offsets(maps.offsets, prompt, y, x, inside, shape)
        cell_x, next_x, fraction_x, slope_x = sample_axis(x, raw_x, shape.max_offset, shape.width)
        cell_y, next_y, fraction_y, slope_y = sample_axis(y, raw_y, shape.max_offset, shape.height)
        features = maps.features + batch_start(prompt, shape.features_batch_stride, CHANNEL_ALIGNMENT)
        top_left, top_right, bottom_left, bottom_right = tap_starts(
            cell_y, next_y, cell_x, next_x, shape, CHANNEL_ALIGNMENT
        )
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
        if alpha_partials is not None and maps.identity is not None:
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


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def identity_sum_kernel(
    grad_identity,  # [H * W * C]
    grad_output,  # [B, H * W * C]
    alpha,  # [B, 2]
    elements,
    prompts,
    ALIGNMENT: tl.constexpr,  # divides the elements
    BLOCK: tl.constexpr,
):
    """Gradient by an identity that was broadcast over the prompts: the sum over them, in their order."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    elements = (elements // ALIGNMENT) * ALIGNMENT
    mask = element < elements
    total = tl.zeros([BLOCK], tl.float32)
    for prompt in range(0, prompts):
        scale = tl.load(alpha + prompt * 2 + 1).to(tl.float32)
        grad = tl.load(grad_output + element, mask=mask, other=0.0)
        total += scale * grad.to(tl.float32)
        grad_output += elements
    tl.store(grad_identity + element, total.to(grad_identity.dtype.element_ty), mask=mask)


def _empty_gradients(wanted: list[bool], inputs: SampleInputs) -> list[Tensor | None]:
    """Uninitialised gradients of features, offsets, identity, alpha and amplitude; None where not asked for."""
    batch, maps = inputs.batch, inputs.maps
    for_features, for_offsets, for_identity, for_alpha, for_amplitude = wanted
    return [
        empty_channels_last(maps.features.shape[0], maps.features) if for_features else None,
        maps.features.new_empty((batch, 2, *maps.features.shape[2:])) if for_offsets else None,
        empty_channels_last(maps.identity.shape[0], maps.identity) if for_identity else None,
        maps.features.new_empty((batch, 2)) if for_alpha else None,
        empty_channels_last(batch, maps.amplitude) if for_amplitude else None,
    ]


def fill_pixel_gradients(
    grad_offsets: Tensor | None,
    grad_identity: Tensor | None,
    grad_alpha: Tensor | None,
    grad_amplitude: Tensor | None,
    grad_output: Tensor,
    inputs: SampleInputs,
) -> None:
    """Fill those gradients, each with the output's batch, that are given."""
    device, features = grad_output.device, inputs.maps.features
    # Such an amplitude adds a load, a store and their registers to each vector of channels: half the pixels.
    tile = pixel_tile(features, _PIXELS_LOADS // 2 if inputs.amplitude_per_channel else _PIXELS_LOADS)
    tiles = inputs.maps.count_tiles(tile)
    alpha_partials = None
    if grad_alpha is not None:
        alpha_partials = torch.empty((inputs.batch, tiles, 2), dtype=torch.float32, device=device)
    launch(
        pixels_kernel,
        inputs.batch * tiles,
        device,
        grad_offsets,
        grad_identity,
        alpha_partials,
        grad_amplitude,
        grad_output,
        inputs.maps,
        inputs.alpha,
        AMPLITUDE_PER_CHANNEL=inputs.amplitude_per_channel,
        CHANNEL_ALIGNMENT=channel_alignment(features),
        CHANNEL_BLOCK=channel_block(features),
        TILE_Y=tile[0],
        TILE_X=tile[1],
        num_warps=WARPS,
    )
    if alpha_partials is not None:
        grad_alpha.copy_(alpha_partials.sum(1))


def fill_identity_gradient(grad_identity: Tensor, grad_output: Tensor, inputs: SampleInputs) -> None:
    """Fill (1, C, H, W) with the sum over prompts."""
    elements = grad_identity.numel()
    launch(
        identity_sum_kernel,
        triton.cdiv(elements, _IDENTITY_BLOCK),
        grad_output.device,
        grad_identity,
        grad_output,
        inputs.alpha,
        elements,
        inputs.batch,
        ALIGNMENT=channel_alignment(inputs.maps.features),
        BLOCK=_IDENTITY_BLOCK,
        num_warps=WARPS,
    )


def deformable_sample_backward(
    grad_output: Tensor,
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
    grad_mask: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Triton's backward of the op in ops/, where shapes and (in register.py) ``grad_mask`` are explained.

    ``deterministic`` changes nothing: there is no other way here. Raises TypeError for an unsupported dtype.
    """
    inputs = prepare_sample(features, offsets, identity, alpha, amplitude, max_offset)
    given = (features, offsets, identity, alpha, amplitude)
    wanted = [bool(grad_mask >> bit & 1) and tensor is not None for bit, tensor in enumerate(given)]
    gradients = _empty_gradients(wanted, inputs)
    grad_features, grad_offsets, grad_identity, grad_alpha, grad_amplitude = gradients

    if grad_output.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    else:
        grad_output = channels_last(grad_output)
        if grad_features is not None:
            fill_features_gradient(grad_features, grad_output, inputs)
        identity_of_each = grad_identity
        if grad_identity is not None and alpha is None:
            identity_of_each = None
            grad_identity.zero_()
        elif grad_identity is not None and grad_identity.shape[0] < inputs.batch:
            identity_of_each = None
            fill_identity_gradient(grad_identity, grad_output, inputs)
        of_pixels = (grad_offsets, identity_of_each, grad_alpha, grad_amplitude)
        if any(gradient is not None for gradient in of_pixels):
            fill_pixel_gradients(*of_pixels, grad_output, inputs)
    return tuple(grad_output.new_empty(0) if gradient is None else gradient for gradient in gradients)
