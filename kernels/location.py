"""Sampling location, bilinear weights and their gradients for Triton; the mathematics of csrc/bilinear.h."""

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
