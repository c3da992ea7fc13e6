"""How programs are cut out of the (B, H, W, C) index space. Shared by all kernels."""

import triton
import triton.language as tl


@triton.jit
def tile_pixels(tile, shape, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Rows and columns (int32) of the pixels of one 2-D tile, and which of them lie inside the map."""
    tiles_x = tl.cdiv(shape.width, TILE_X)
    local = tl.arange(0, TILE_Y * TILE_X)
    y = (tile // tiles_x) * TILE_Y + local // TILE_X
    x = (tile % tiles_x) * TILE_X + local % TILE_X
    return y, x, (y < shape.height) & (x < shape.width)


@triton.jit
def pixels_of(shape):
    """H * W, int64. A size of 1 is known to the compiler and no tensor: `tl.cast` takes it, a method would not."""
    return tl.cast(shape.height, tl.int64) * shape.width


@triton.jit
def tiles_of(shape, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    return tl.cdiv(shape.height, TILE_Y) * tl.cdiv(shape.width, TILE_X)


@triton.jit
def batch_start(prompt, stride, ALIGNMENT: tl.constexpr):
    """int64 index of the first element of a prompt; ALIGNMENT divides the stride, and so the compiler knows it."""
    return prompt * ((stride // ALIGNMENT) * ALIGNMENT)


@triton.jit
def pixel_start(y, x, shape, CHANNEL_ALIGNMENT: tl.constexpr):
    """int64 element index of channel 0 of a pixel in one dense (H, W, C) map.

    CHANNEL_ALIGNMENT divides C. Written as a factor it proves to the compiler that every pixel starts
    at a multiple of it, which is what lets a thread move 16 bytes with one instruction.
    """
    channels = (shape.channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT
    return (y.to(tl.int64) * shape.width + x) * channels


@triton.jit
def load_offsets(offsets, prompt, y, x, inside, shape):
    """The raw offsets (x, y) of a tile's pixels, in the dtype they have."""
    pixel = offsets + prompt * shape.offsets_batch_stride
    pixel += y.to(tl.int64) * shape.offsets_row_stride + x.to(tl.int64) * shape.offsets_column_stride
    raw_x = tl.load(pixel, mask=inside, other=0.0)
    raw_y = tl.load(pixel + shape.offsets_axis_stride, mask=inside, other=0.0)
    return raw_x, raw_y
