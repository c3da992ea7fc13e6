"""What the kernels of sampled_attention share: the maps of a prompt, a tile of pixels, keys and values by chunks.

A chunk of channels is loaded, blended and handed to the matrix units before the next, so that registers hold one chunk
in float32 at a time. Axes in names and shapes: R query rows, P pixels of a tile, K channels of a chunk.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..launch import INTERPRETED
from ..location import batch_start, count_tiles, load_offsets, sample_axis, tile_pixels
from ..shapes import SampleShape

_INTERPRETED = tl.constexpr(INTERPRETED)


class PromptMaps(NamedTuple):
    """`shapes.Maps` with the pointers, but the offsets', moved to one prompt, and the prompt's two scales."""

    prompt: tl.tensor  # int64
    features: tl.tensor  # [H, W, C]
    identity: tl.tensor  # [H, W, C]
    key_pe: tl.tensor  # [H, W, C]
    offsets: tl.tensor  # [1 or B, 2, H, W], any strides
    sample_scale: tl.tensor
    identity_scale: tl.tensor
    shape: SampleShape


class Tile(NamedTuple):
    """The pixels of one tile and what they are sampled from."""

    pixel: tl.tensor  # P indices (int32)
    inside: tl.tensor  # P, whether it lies on the map
    taps: tl.tuple  # 4 times P indices (int32)
    weights: tl.tuple  # 4 times P (float32), the sample's scale included


@triton.jit
def maps_of_prompt(maps, alpha, prompt, CHANNELS: tl.constexpr):
    """`PromptMaps` of a prompt (int64)."""
    shape = maps.shape
    features = maps.features + batch_start(prompt, shape.features_batch_stride, CHANNELS)
    identity = maps.identity + batch_start(prompt, shape.identity_batch_stride, CHANNELS)
    key_pe = maps.key_pe + batch_start(prompt, shape.key_pe_batch_stride, CHANNELS)
    alpha += prompt * 2
    sample_scale = tl.load(alpha).to(tl.float32)
    identity_scale = tl.load(alpha + 1).to(tl.float32)
    return PromptMaps(prompt, features, identity, key_pe, maps.offsets, sample_scale, identity_scale, shape)


@triton.jit
def tiles_of_share(share, shape, splits, tiles_of_split, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """First tile of a share of the map, the first that is no longer its, and the number of all tiles."""
    first = (share % splits) * tiles_of_split
    tiles = count_tiles(shape, TILE_Y, TILE_X)
    return first, tl.minimum(first + tiles_of_split, tiles), tiles


@triton.jit
def load_raw_offsets(maps, tile, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """The raw offsets (x, y) of a tile's pixels; all 0 for the tile after the last."""
    y, x, inside = tile_pixels(tile, maps.shape, TILE_Y, TILE_X)
    return load_offsets(maps.offsets, maps.prompt, y, x, inside, maps.shape)


@triton.jit
def locate_tile(maps, tile, raw_offsets, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, OFFSETS_AHEAD: tl.constexpr):
    """A `Tile`. ``raw_offsets`` are its own where they were loaded ahead, and are loaded here where not."""
    y, x, inside = tile_pixels(tile, maps.shape, TILE_Y, TILE_X)
    pixel = y * maps.shape.width + x
    if not OFFSETS_AHEAD:
        raw_offsets = load_offsets(maps.offsets, maps.prompt, y, x, inside, maps.shape)
    taps, weights = find_taps(raw_offsets[0], raw_offsets[1], y, x, maps.sample_scale, maps.shape)
    return Tile(pixel, inside, taps, weights)


@triton.jit
def find_taps(raw_x, raw_y, y, x, sample_scale, shape):
    """Pixel indices (int32) and weights (float32, ``sample_scale`` included) of the four taps of P pixels."""
    cell_x, next_x, fraction_x, _ = sample_axis(x, raw_x, shape.max_offset, shape.width)
    cell_y, next_y, fraction_y, _ = sample_axis(y, raw_y, shape.max_offset, shape.height)
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
def keys_and_values(maps, tile, channel, CHANNELS: tl.constexpr, ALL_CHANNELS: tl.constexpr):
    """Keys (P, K) in the features' dtype, and values (P, K) float32; values are 0 outside the map.

    The values are ``u = alpha_1 * features[p + s_p tanh(raw)] + alpha_2 * identity[p]``, the keys u with the
    positional encoding added.
    """
    passed = load_chunk(maps.identity, tile.pixel, channel, tile.inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
    values = maps.identity_scale * passed
    for i in tl.static_range(4):
        tap = load_chunk(maps.features, tile.taps[i], channel, tile.inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
        values += tile.weights[i][:, None] * tap
    encoding = load_chunk(maps.key_pe, tile.pixel, channel, tile.inside, CHANNELS, ALL_CHANNELS).to(tl.float32)
    return (values + encoding).to(maps.features.dtype.element_ty), values


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
