"""Backward of deformable_sample: which kernels run for which gradients, and with which block sizes.

Nothing is kept from the forward but its inputs. Every kernel gathers and every sum has a fixed order,
so the result is the same bit for bit in each run, asked for or not.
"""

import math

import torch
import triton
from torch import Tensor

from .backward_features import gather_kernel, locations_kernel
from .backward_identity import identity_sum_kernel
from .backward_pixels import pixels_kernel
from .launch import (
    WARPS,
    channel_alignment,
    channel_block,
    device_of,
    launch,
    pixel_tile,
    split_evenly,
    tile_count,
)
from .sampling_shape import SamplingInputs, SamplingShape, channels_last, empty_channels_last, prepare_inputs

_PIXELS_LOADS = 2  # of each thread, for each tensor and each block of channels
_LOCATIONS_TILE = (8, 32)
_TARGETS_TILE = (2, 2)  # with 128 bytes of channels each, one warp of 16-byte loads
_CHANNELS_IN_REGISTERS = 256  # of each target, in the gather
_GATHERS = 16  # programs of the gather, of one warp each, that a multiprocessor runs at once
_IDENTITY_BLOCK = 1024


def gather_radius(max_offset: float, shape: SamplingShape) -> int:
    """How far a target can lie from a pixel that samples it, no farther than the map goes.

    At least 1, because a NaN location has the next pixel among its taps whatever the maximal offset.
    """
    return max(1, math.ceil(min(abs(max_offset), max(shape.height, shape.width))))


def _empty_gradients(wanted: list[bool], inputs: SamplingInputs) -> list[Tensor | None]:
    """Uninitialised gradients of features, offsets, identity, alpha and amplitude; None where not asked for."""
    batch, features, identity, amplitude = inputs.batch, inputs.features, inputs.identity, inputs.amplitude
    for_features, for_offsets, for_identity, for_alpha, for_amplitude = wanted
    return [
        empty_channels_last(features.shape[0], features) if for_features else None,
        features.new_empty((batch, 2, *features.shape[2:])) if for_offsets else None,
        empty_channels_last(identity.shape[0], identity) if for_identity else None,
        features.new_empty((batch, 2)) if for_alpha else None,
        empty_channels_last(batch, amplitude) if for_amplitude else None,
    ]


def gather_features(grad_features: Tensor, grad_output: Tensor, inputs: SamplingInputs, max_offset: float) -> None:
    """Fill (1 or B, C, H, W); summed over prompts where the features' batch of 1 was broadcast."""
    device, shape = grad_output.device, inputs.shape
    offsets_batch = inputs.offsets.shape[0]
    locations = torch.empty((offsets_batch, 2, shape.height, shape.width), dtype=torch.float32, device=device)
    launch(
        locations_kernel,
        offsets_batch * tile_count(shape.height, shape.width, _LOCATIONS_TILE),
        device,
        locations,
        inputs.offsets,
        shape,
        max_offset,
        TILE_Y=_LOCATIONS_TILE[0],
        TILE_X=_LOCATIONS_TILE[1],
        num_warps=WARPS,
    )
    block = channel_block(inputs.features)
    blocks = min(_CHANNELS_IN_REGISTERS // block, triton.next_power_of_2(triton.cdiv(shape.channels, block)))
    channel_groups = triton.cdiv(shape.channels, block * blocks)
    radius = gather_radius(max_offset, shape)
    programs = tile_count(shape.height, shape.width, _TARGETS_TILE) * channel_groups
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
        inputs.amplitude,
        shape,
        0 if offsets_batch == 1 else locations[0].numel(),
        inputs.batch,
        prompts_of_share,
        min(2 * radius + 1, shape.height),
        radius,
        WINDOW_WIDTH=min(2 * radius + 1, shape.width),
        AMPLITUDE_PER_CHANNEL=inputs.amplitude_channels > 1,
        CHANNEL_ALIGNMENT=channel_alignment(inputs.features),
        CHANNEL_BLOCK=block,
        CHANNEL_BLOCKS=blocks,
        TILE_Y=_TARGETS_TILE[0],
        TILE_X=_TARGETS_TILE[1],
        num_warps=1,
    )
    if sums is not grad_features:
        grad_features.copy_(sums.sum(0, keepdim=True))


def walk_pixels(
    grad_offsets: Tensor | None,
    grad_identity: Tensor | None,
    grad_alpha: Tensor | None,
    grad_amplitude: Tensor | None,
    grad_output: Tensor,
    inputs: SamplingInputs,
    max_offset: float,
) -> None:
    """Fill those gradients, each with the output's batch, that are given."""
    device, shape = grad_output.device, inputs.shape
    amplitude_per_channel = inputs.amplitude_channels > 1
    # Such an amplitude adds a load, a store and their registers to each vector of channels: half the pixels.
    tile = pixel_tile(inputs.features, _PIXELS_LOADS // 2 if amplitude_per_channel else _PIXELS_LOADS)
    tiles = tile_count(shape.height, shape.width, tile)
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
        inputs.features,
        inputs.offsets,
        inputs.identity,
        inputs.alpha,
        inputs.amplitude,
        shape,
        max_offset,
        AMPLITUDE_PER_CHANNEL=amplitude_per_channel,
        CHANNEL_ALIGNMENT=channel_alignment(inputs.features),
        CHANNEL_BLOCK=channel_block(inputs.features),
        TILE_Y=tile[0],
        TILE_X=tile[1],
        num_warps=WARPS,
    )
    if alpha_partials is not None:
        grad_alpha.copy_(alpha_partials.sum(1))


def sum_identity(grad_identity: Tensor, grad_output: Tensor, inputs: SamplingInputs) -> None:
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
        ALIGNMENT=channel_alignment(inputs.features),
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
    """Triton's backward of the op in ops/schema.py, where shapes and ``grad_mask`` are explained.

    ``deterministic`` changes nothing: there is no other way here. Raises TypeError for an unsupported dtype.
    """
    inputs = prepare_inputs(features, offsets, identity, alpha, amplitude)
    given = (features, offsets, identity, alpha, amplitude)
    wanted = [bool(grad_mask >> bit & 1) and tensor is not None for bit, tensor in enumerate(given)]
    gradients = _empty_gradients(wanted, inputs)
    grad_features, grad_offsets, grad_identity, grad_alpha, grad_amplitude = gradients

    if grad_output.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    else:
        grad_output, max_offset = channels_last(grad_output), float(max_offset)
        if grad_features is not None:
            gather_features(grad_features, grad_output, inputs, max_offset)
        identity_of_each = grad_identity
        if grad_identity is not None and alpha is None:
            identity_of_each = None
            grad_identity.zero_()
        elif grad_identity is not None and grad_identity.shape[0] < inputs.batch:
            identity_of_each = None
            sum_identity(grad_identity, grad_output, inputs)
        asked = (grad_offsets, identity_of_each, grad_alpha, grad_amplitude)
        if any(gradient is not None for gradient in asked):
            walk_pixels(*asked, grad_output, inputs, max_offset)
    return tuple(grad_output.new_empty(0) if gradient is None else gradient for gradient in gradients)
