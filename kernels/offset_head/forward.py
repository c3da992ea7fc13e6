"""Forward of offset_head: one program per tile of pixels, all channels of a pixel in the registers of one warp.

Nothing but the two offsets of a pixel is written. The features are read from device memory once: what neighbouring
tiles and rows share is found in the caches.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, SMALL, launch, tile_count
from .plan import head_plan, prepare_head
from .tile import depthwise, groups_of, load_row, normal_distribution, normalise, tile_groups


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def _offset_head_kernel(
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
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    GROUPS: tl.constexpr = TILE_Y * TILE_GROUPS
    program = tl.program_id(0)
    tiles = groups_of(height, width, TILE_Y, TILE_GROUPS, COLUMNS)
    prompt = (program // tiles).to(tl.int64)
    y, x = tile_groups(program % tiles, width, TILE_Y, TILE_GROUPS, COLUMNS)
    features += prompt * height * width * CHANNELS
    output += prompt * 2 * height * width
    channel = tl.arange(0, CHANNEL_BLOCK)

    bias = load_row(table, TAPS, channel, GROUPS, CHANNELS)
    hidden = depthwise(
        features, table, bias, y, x, height, width, kernel_rows, channel, False, KERNEL_SIZE, CHANNELS, COLUMNS
    )
    norm_weight = load_row(table, TAPS + 1, channel, GROUPS, CHANNELS)
    norm_bias = load_row(table, TAPS + 2, channel, GROUPS, CHANNELS)
    weight_x = load_row(table, TAPS + 3, channel, GROUPS, CHANNELS)
    weight_y = load_row(table, TAPS + 4, channel, GROUPS, CHANNELS)
    bias_x = tl.load(pointwise_bias).to(tl.float32)
    bias_y = tl.load(pointwise_bias + 1).to(tl.float32)
    dtype = output.dtype.element_ty
    for column in tl.static_range(COLUMNS):
        normalised, _ = normalise(hidden[column], channel, eps, CHANNELS)
        scaled = normalised * norm_weight + norm_bias
        activated = scaled * normal_distribution(scaled)
        at = output + y.to(tl.int64) * width + (x + column)
        inside = (y < height) & (x + column < width)
        tl.store(at, (tl.sum(activated * weight_x, axis=1) + bias_x).to(dtype), mask=inside)
        tl.store(at + height * width, (tl.sum(activated * weight_y, axis=1) + bias_y).to(dtype), mask=inside)


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
    """Triton's forward of the op in ops/schema.py; shapes as in ops/reference.py, checked by the caller.

    Raises TypeError for a dtype other than float32, float16 and bfloat16.
    """
    parameters = (depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias)
    inputs = prepare_head(features, *parameters)
    batch, channels, height, width = features.shape
    output = features.new_empty((batch, 2, height, width))
    if output.numel() == 0:
        return output
    plan = head_plan(channels)
    launch(
        _offset_head_kernel,
        batch * tile_count(height, width, plan.tile),
        output.device,
        output,
        inputs.features,
        inputs.table,
        inputs.pointwise_bias.contiguous(),
        height,
        width,
        inputs.kernel_size,
        float(eps),
        KERNEL_SIZE=inputs.kernel_size,
        CHANNELS=channels,
        **plan.constants,
    )
    return output
