"""Forward of offset_head: one program per tile of pixels, all channels of a pixel in the registers of one warp.

Nothing but the two offsets of a pixel is written. The features are read from device memory once: what neighbouring
tiles and rows share is found in the caches.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, launch, tile_count
from ..shapes import HeadParameters, prepare_head
from .plan import head_plan
from .tile import find_hidden, locate_tile, normal_distribution, normalise, pixels_of_column


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def offset_head_kernel(
    output,  # [B, 2, H, W]
    features,  # [B, H, W, C]
    table,  # [k * k + 5, C]
    pointwise_bias,  # [2]
    height,
    width,
    kernel_rows,  # k
    eps,
    KERNEL_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = locate_tile(tl.program_id(0), height, width, TILE_Y, TILE_GROUPS, COLUMNS)
    output += 2 * tile.map_start
    channel = tl.arange(0, CHANNEL_BLOCK)
    hidden = find_hidden(features, table, tile, kernel_rows, channel, KERNEL_SIZE, CHANNELS, COLUMNS)
    bias_x = tl.load(pointwise_bias).to(tl.float32)
    bias_y = tl.load(pointwise_bias + 1).to(tl.float32)
    dtype = output.dtype.element_ty
    for column in tl.static_range(COLUMNS):
        normalised, _ = normalise(hidden.columns[column], channel, eps, CHANNELS)
        scaled = normalised * hidden.norm_weight + hidden.norm_bias
        activated = scaled * normal_distribution(scaled)
        pixel, inside = pixels_of_column(tile, column)
        at = output + pixel
        tl.store(at, (tl.sum(activated * hidden.weight_x, axis=1) + bias_x).to(dtype), mask=inside)
        tl.store(at + height * width, (tl.sum(activated * hidden.weight_y, axis=1) + bias_y).to(dtype), mask=inside)


def offset_head(
    features: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor,
    eps: float,
) -> Tensor:
    """Triton's forward of the op in ops/; shapes as in ops/reference.py, checked by the caller.

    Raises TypeError for a dtype other than float32, float16 and bfloat16.
    """
    parameters = HeadParameters(
        depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias
    )
    inputs = prepare_head(features, parameters, eps)
    batch, channels, height, width = features.shape
    output = features.new_empty((batch, 2, height, width))
    if output.numel() == 0:
        return output
    plan = head_plan(channels)
    launch(
        offset_head_kernel,
        batch * tile_count(height, width, plan.tile),
        output.device,
        output,
        inputs.features,
        inputs.table,
        inputs.pointwise_bias,
        *inputs.sizes,
        inputs.eps,
        KERNEL_SIZE=inputs.kernel_size,
        CHANNELS=channels,
        **plan.constants,
    )
    return output
