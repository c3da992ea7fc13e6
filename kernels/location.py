"""Where a program's pixels lie and where each is sampled: tiles, addresses, locations, bilinear weights, gradients.

The mathematics of csrc/bilinear.h.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh in float32 to a few units of 1e-7, for any x: NaN stays NaN, an infinity gives 1 with its sign.

    exp(-2|x|) never overflows. Below 1/4, where that form cancels, a polynomial keeps the relative
    accuracy, and with it the sign of the tiny offsets that training starts from.
    """
    magnitude = tl.abs(x)
    decay = tl.exp(-2.0 * magnitude)
    saturating = (1.0 - decay) / (1.0 + decay)
    small = tl.minimum(magnitude, 0.25)
    square = small * small
    series = -0.3333333333 + square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885))
    squashed = tl.where(magnitude < 0.25, small * (1.0 + square * series), saturating)
    return tl.where(x < 0, -squashed, squashed)


@triton.jit
def displace(position, raw, max_offset, size):
    """``clamp(position + max_offset * tanh(raw), 0, size - 1)`` and its derivative by ``raw``, both float32.

    A NaN offset gives a NaN location. The derivative is 0 where the clamp binds.
    """
    squashed = tanh(raw.to(tl.float32))
    wanted = position.to(tl.float32) + max_offset * squashed
    last = tl.cast(size - 1, tl.float32)
    below, above = wanted < 0.0, wanted > last
    location = tl.where(below, 0.0, tl.where(above, last, wanted))
    slope = tl.where(below | above, 0.0, max_offset * (1.0 - squashed * squashed))
    return location, slope


@triton.jit
def locate_cell(location, position):
    """Floor of a location and the fraction above it, both float32.

    A NaN location keeps the undisplaced cell, so nothing outside the tensor is read, and gets a NaN fraction.
    """
    cell = tl.where(location == location, tl.floor(location), position.to(tl.float32))
    return cell, location - cell


@triton.jit
def sample_axis(position, raw, max_offset, size):
    """Cell, the tap after it (both int32, inside the map), fraction and slope along one axis."""
    location, slope = displace(position, raw, max_offset, size)
    cell, fraction = locate_cell(location, position)
    cell = tl.minimum(cell.to(tl.int32), size - 1)
    return cell, tl.minimum(cell + 1, size - 1), fraction, slope


@triton.jit
def touches(location, position, target):
    """Whether the sample of pixel ``position``, taken at ``location``, has ``target`` among its taps along one axis.

    The taps are the cell and the pixel after it, the latter even where its weight is 0. Ask along both
    axes before multiplying weights: a NaN weight along one must not reach a target that is no tap along the other.
    """
    distance = location - target.to(tl.float32)
    step = target - position
    near = (distance >= -1.0) & (distance < 1.0)
    return near | ((location != location) & ((step == 0) | (step == 1)))


@triton.jit
def tap_weight(location_y, location_x, y, x):
    """Weight of a tap (y, x): bilinear interpolation is the hat function along each axis. NaN for a NaN location."""
    return (1.0 - tl.abs(location_y - y.to(tl.float32))) * (1.0 - tl.abs(location_x - x.to(tl.float32)))


@triton.jit
def tile_pixels(tile, shape, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Rows and columns (int32) of the pixels of one 2-D tile, and which of them lie inside the map."""
    tiles_x = tl.cdiv(shape.width, TILE_X)
    local = tl.arange(0, TILE_Y * TILE_X)
    y = (tile // tiles_x) * TILE_Y + local // TILE_X
    x = (tile % tiles_x) * TILE_X + local % TILE_X
    return y, x, (y < shape.height) & (x < shape.width)


@triton.jit
def count_pixels(shape):
    """H * W, int64. A size of 1 is known to the compiler and no tensor: `tl.cast` takes it, a method would not."""
    return tl.cast(shape.height, tl.int64) * shape.width


@triton.jit
def count_tiles(shape, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Number of tiles of one map."""
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
def tap_starts(cell_y, next_y, cell_x, next_x, shape, CHANNEL_ALIGNMENT: tl.constexpr):
    """`pixel_start` of the four taps, top left, top right, bottom left and bottom right, with an axis for channels."""
    top_left = pixel_start(cell_y, cell_x, shape, CHANNEL_ALIGNMENT)[:, None]
    top_right = pixel_start(cell_y, next_x, shape, CHANNEL_ALIGNMENT)[:, None]
    bottom_left = pixel_start(next_y, cell_x, shape, CHANNEL_ALIGNMENT)[:, None]
    bottom_right = pixel_start(next_y, next_x, shape, CHANNEL_ALIGNMENT)[:, None]
    return top_left, top_right, bottom_left, bottom_right


@triton.jit
def load_offsets(offsets, prompt, y, x, inside, shape):
    """The raw offsets (x, y) of a tile's pixels, in the dtype they have."""
    pixel = offsets + prompt * shape.offsets_batch_stride
    pixel += y.to(tl.int64) * shape.offsets_row_stride + x.to(tl.int64) * shape.offsets_column_stride
    raw_x = tl.load(pixel, mask=inside, other=0.0)
    raw_y = tl.load(pixel + shape.offsets_axis_stride, mask=inside, other=0.0)
    return raw_x, raw_y
