"""What the kernels of sampled_attention share: the calibrated features u of one tile of pixels, in chunks of channels.

A chunk is loaded, blended and handed to the matrix units before the next, so that registers hold one chunk in float32
at a time. Axes in names and shapes: R query rows, P pixels of a tile, K channels of a chunk.
"""

import triton
import triton.language as tl

from ..launch import INTERPRETED
from ..location import sample_axis

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """``left @ right + acc``, accumulated in float32.

    ``left`` has fewer than 64 rows. From 64 on Triton takes the instructions of Hopper's warp groups, and what Triton
    3.6 makes of these chains of products with them is wrong on an H200: float32's read beyond their shared memory, and
    gradients of the half types were wrong or ended in an illegal access (docs/decisions.md).
    """
    if _INTERPRETED:  # which multiplies the bits of a bfloat16 as if they were an integer's
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc=acc, input_precision=PRECISION)


@triton.jit
def load_chunk(image, index, channel, valid, CHANNELS: tl.constexpr, ALL_CHANNELS: tl.constexpr):
    """(len(index), K) elements of a dense (.., C) array, in its own dtype; 0 where not ``valid`` or beyond C.

    ALL_CHANNELS says that chunks divide C: then nothing needs a mask along the channels.
    """
    mask = valid[:, None]
    if not ALL_CHANNELS:
        mask = mask & (channel < CHANNELS)[None, :]
    start = index.to(tl.int64) * CHANNELS
    return tl.load(image + (start[:, None] + channel[None, :]), mask=mask, other=0.0)


@triton.jit
def store_chunk(image, value, index, channel, valid, CHANNELS: tl.constexpr, ALL_CHANNELS: tl.constexpr):
    """The counterpart of `load_chunk`; rounds to the dtype of the array."""
    mask = valid[:, None]
    if not ALL_CHANNELS:
        mask = mask & (channel < CHANNELS)[None, :]
    start = index.to(tl.int64) * CHANNELS
    tl.store(image + (start[:, None] + channel[None, :]), value.to(image.dtype.element_ty), mask=mask)


@triton.jit
def find_taps(raw_x, raw_y, y, x, sample_scale, max_offset, shape):
    """Pixel indices (int32) and weights (float32, ``sample_scale`` included) of the four taps of P pixels."""
    cell_x, next_x, fraction_x, _ = sample_axis(x, raw_x, max_offset, shape.width)
    cell_y, next_y, fraction_y, _ = sample_axis(y, raw_y, max_offset, shape.height)
    top, bottom = cell_y * shape.width, next_y * shape.width
    top_scale, bottom_scale = sample_scale * (1.0 - fraction_y), sample_scale * fraction_y
    taps = (top + cell_x, top + next_x, bottom + cell_x, bottom + next_x)
    weights = (
        top_scale * (1.0 - fraction_x),
        top_scale * fraction_x,
        bottom_scale * (1.0 - fraction_x),
        bottom_scale * fraction_x,
    )
    return taps, weights


@triton.jit
def calibrated_chunk(
    features,  # [H, W, C] of one prompt
    identity,  # [H, W, C] of one prompt
    own,  # P pixel indices
    taps,
    weights,
    identity_scale,
    channel,
    inside,
    CHANNELS: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
):
    """``u = alpha_1 * features[p + s_p tanh(raw)] + alpha_2 * identity[p]``: (P, K) float32, 0 outside the map."""
    passed = load_chunk(identity, own, channel, inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
    calibrated = identity_scale * passed
    for i in tl.static_range(4):
        value = load_chunk(features, taps[i], channel, inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
        calibrated += weights[i][:, None] * value
    return calibrated
