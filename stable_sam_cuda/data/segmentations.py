"""COCO's segmentations: polygons and run lengths, checked and decoded without any C++ routine that trusts its input.

A decoded object is its *borders*: the ascending places, counted down the columns of the picture, at which the object
begins and ends by turns. They take memory by the object's outline, not by the picture's pixels.
"""

import math
import reprlib
from typing import Any

import numpy as np

# Polygons are drawn on a grid of fifths of a pixel, by COCO's rule: the middle of column c is 5 c + 2.
GRID = 5

# Corners farther out are clipped, so that places on the grid stay exact. No picture's side comes near.
FARTHEST = 1e7

# Places at which edges cross columns are found in parts of so many, which bounds the memory.
CROSSINGS_A_PASS = 1 << 18


# Corners that are fractions of the picture may be so far beyond its edges.
ROUNDING = 0.05


# Crossings are marked in a map of all pixels where they are more than one to so many pixels.
MARKED_FROM = 8


class SegmentationError(ValueError):
    """A segmentation that cannot be used: ``reason`` is the same text for all such, ``got`` is what this one has."""

    def __init__(self, reason: str, *got: object) -> None:
        self.reason, self.got = reason, ", ".join(map(reprlib.repr, got))
        super().__init__(f"{reason} ({self.got})" if got else reason)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Mask (H, W) bool of a COCO segmentation: polygons, or run lengths, compressed or not.

    Polygons come as ``[x, y, x, y, ...]``, as ``[[x, y], [x, y], ...]``, or as a list of such; closed or open. Their
    corners may lie outside of the picture, at any distance.

    Raises:
        SegmentationError (a ValueError): there is none, a polygon has fewer than three corners, a number is none or
            not finite, all corners lie within 0 to 1, or the run lengths do not fit the picture.
    """
    return filled(borders_of(segmentation, height, width), height, width)


def borders_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Borders (N,) int64 of a COCO segmentation, N being even; see `decode_segmentation`.

    Raises:
        SegmentationError: as `decode_segmentation`.
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        raise SegmentationError("expected a segmentation, got none")
    if isinstance(segmentation, dict):
        return _runs(segmentation, height, width)
    if not isinstance(segmentation, list | tuple):
        raise SegmentationError("segmentation: expected polygons or run lengths, got something else", segmentation)
    polygons = _polygons(segmentation)
    if max(height, width) > 1 and are_fractions(np.concatenate(polygons)):
        raise SegmentationError(
            "segmentation: expected corners in pixels, got ones within 0 to 1, as fractions of the picture are"
        )
    return _union([_outline(corners, height, width) for corners in polygons])


def are_fractions(numbers: Any) -> bool:
    """Whether lengths look normalised by the picture's size: all within 0 to 1, but for rounding."""
    return bool(np.min(numbers) > -ROUNDING and np.max(numbers) < 1 + ROUNDING)


def size_of_runs(segmentation: Any) -> tuple[float, float] | None:
    """Height and width that run lengths say they are for; None for other segmentations."""
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(one, int | float) for one in size):
        return None
    return size[0], size[1]


def borders_around(mask: np.ndarray) -> np.ndarray:
    """Borders (N,) int64 of a mask (H, W) bool."""
    return np.flatnonzero(np.diff(mask.ravel("F"), prepend=False, append=False))


def box_around(borders: np.ndarray, height: int, width: int) -> tuple[int, int, int, int] | None:
    """The smallest box x0, y0, x1, y1 around an object, from edge to edge of pixels; None where it has no pixel."""
    mask = filled(borders, height, width)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None


def area_of(borders: np.ndarray) -> int:
    """Pixels of an object."""
    return int((borders[1::2] - borders[::2]).sum())


def paint(image: np.ndarray, borders: np.ndarray, value: int) -> None:
    """Set the object's pixels of ``image`` (H, W) to ``value``."""
    if not len(borders):
        return
    height = image.shape[0]
    first, last = int(borders[0]) // height, -(-int(borders[-1]) // height)  # the columns that the object is in
    steps = np.zeros((last - first) * height + 1, np.uint8)
    steps[borders - first * height] = 1
    inside = np.bitwise_xor.accumulate(steps[:-1]).view(bool).reshape(last - first, height)
    image[:, first:last][inside.T] = value


def filled(borders: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask (H, W) bool of an object."""
    mask = np.zeros((height, width), bool)
    paint(mask, borders, True)
    return mask


def _polygons(parts: list[Any] | tuple[Any, ...]) -> list[np.ndarray]:
    """Corners (K, 2) float64 of each polygon, whatever way they are nested."""
    lists = [isinstance(part, list | tuple) for part in parts]
    if not any(lists) or all(_is_pair(part) for part in parts):
        return [_corners(parts)]
    return [_corners(part) for part in parts]


def _is_pair(part: Any) -> bool:
    return isinstance(part, list | tuple) and len(part) == 2 and not any(isinstance(one, list | tuple) for one in part)


def _corners(polygon: Any) -> np.ndarray:
    if not isinstance(polygon, list | tuple):
        raise SegmentationError("segmentation: expected a polygon, got something else", polygon)
    numbers = [one for pair in polygon for one in pair] if all(map(_is_pair, polygon)) else polygon
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise SegmentationError("segmentation: expected numbers for a polygon, got something else", number)
    if len(numbers) < 6 or len(numbers) % 2:
        reason = "segmentation: expected polygons of three or more x, y pairs, got another count"
        raise SegmentationError(reason, len(numbers))
    try:
        corners = np.array([float(number) for number in numbers]).reshape(-1, 2)
    except OverflowError:
        corners = np.array([[math.inf, math.inf]])
    if not np.isfinite(corners).all():
        raise SegmentationError("segmentation: expected finite numbers for a polygon, got NaN or infinity")
    return corners


def _clipped(corners: np.ndarray) -> np.ndarray:
    """The polygon's part within `FARTHEST` of the origin on both axes, by Sutherland and Hodgman's method."""
    for axis in (0, 1):
        for sign in (1.0, -1.0):
            following = np.roll(corners, -1, 0)
            here, there = sign * corners[:, axis], sign * following[:, axis]
            within = here <= FARTHEST
            crossing = within != (there <= FARTHEST)
            # Halves, since the difference of two floats may be larger than floats are.
            start, end = here[crossing] / 2, there[crossing] / 2
            share = ((FARTHEST / 2 - start) / (end - start))[:, None]
            cuts = corners[crossing] * (1 - share) + following[crossing] * share
            cuts[:, axis] = sign * FARTHEST
            both = np.stack([corners, corners], 1)
            both[crossing, 1] = cuts
            corners = both[np.stack([within, crossing], 1)]
    return corners


def _outline(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Borders of a polygon, pixel for pixel as COCO's own tools draw it."""
    if np.abs(corners).max() > FARTHEST:
        corners = _clipped(corners)
    # Truncated, not rounded: as C converts to int.
    points = np.trunc(corners * GRID + 0.5).astype(np.int64)
    start, end = points, np.roll(points, -1, 0)
    run, rise = np.abs(end - start).T
    # An edge is followed along its longer axis, in ascending order.
    turned = np.where(run >= rise, start[:, 0] > end[:, 0], start[:, 1] > end[:, 1])[:, None]
    start, end = np.where(turned, end, start), np.where(turned, start, end)
    left, right = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    first = np.maximum(-((2 - left) // GRID), 0)
    last = np.minimum((right - 3) // GRID, width - 1)
    crossings = np.maximum(last - first + 1, 0)
    reached = np.cumsum(crossings)
    # Few crossings are sorted; where they are as many as pixels, it takes less time to mark each place.
    is_border = np.zeros(height * width + 1, bool) if crossings.sum() > height * width // MARKED_FROM else None
    borders = np.zeros(0, np.int64)
    for part in np.split(np.arange(len(points)), np.flatnonzero(np.diff(reached // CROSSINGS_A_PASS)) + 1):
        edge = np.repeat(part, crossings[part])
        place = np.arange(len(edge)) - np.repeat(np.cumsum(crossings[part]) - crossings[part], crossings[part])
        column = first[edge] + place
        y = _heights(start[edge], end[edge], column)
        places = column * height + np.clip((y + 2) // GRID, 0, height)
        if is_border is None:
            borders = _odd(np.append(borders, places))
        else:
            np.bitwise_xor.at(is_border, places, True)
    return borders if is_border is None else np.flatnonzero(is_border)


def _heights(start: np.ndarray, end: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Heights (N,) on the grid at which edges (N, 2) to (N, 2) cross the middle of their columns."""
    run, rise = (end - start).T
    flat = np.abs(run) >= np.abs(rise)
    middle = GRID * column + 2
    slope = np.where(flat, rise / np.where(flat, run, 1), run / np.where(flat, 1, rise))
    # Flat edges: the higher one of the points on both sides of the middle.
    along = middle - start[:, 0]
    sides = [np.trunc(start[:, 1] + slope * (along + step) + 0.5) for step in (0, 1)]
    # Steep ones: the last point before the one beyond the middle. The guess may be off by a rounding error.
    with np.errstate(divide="ignore", invalid="ignore"):
        guess = np.where(flat, 0, np.floor((middle + 0.5 - start[:, 0]) / slope))
    beyond = guess + 2
    for step in (1, 0, -1):
        right = start[:, 0] + slope * (guess + step) + 0.5 >= middle + 1
        beyond = np.where(right == (slope > 0), guess + step, beyond)
    steep = start[:, 1] + np.where(flat, 0, np.clip(beyond, 1, rise)) - 1
    return np.where(flat, np.minimum(*sides), steep).astype(np.int64)


def _odd(places: np.ndarray) -> np.ndarray:
    """The places that occur an odd number of times, in ascending order: two borders at one place are none."""
    found, counts = np.unique(places, return_counts=True)
    return found[counts % 2 == 1]


def _union(objects: list[np.ndarray]) -> np.ndarray:
    """Borders of what is in any of the objects."""
    if len(objects) == 1:
        return objects[0]
    places = np.concatenate(objects)
    steps = np.concatenate([1 - 2 * (np.arange(len(borders)) % 2) for borders in objects])
    places, where = np.unique(places, return_inverse=True)
    inside = np.cumsum(np.bincount(where, steps, len(places))) > 0.5
    return places[inside != np.concatenate([[False], inside[:-1]])]


def _runs(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Borders of run lengths, as a list of numbers or packed into text."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    expected = [height, width]
    if not isinstance(size, list | tuple) or list(size) != expected:
        turned = isinstance(size, list | tuple) and list(size) == expected[::-1]
        hint = "another, with width and height swapped" if turned else "another"
        raise SegmentationError(f"segmentation: expected run lengths of size {expected}, got {hint}", size)
    if isinstance(counts, str | bytes):
        runs = _unpacked(counts, height * width)
    elif isinstance(counts, list | tuple):
        for count in counts:
            whole = isinstance(count, int) or (isinstance(count, float) and count.is_integer())
            if isinstance(count, bool) or not whole:
                raise SegmentationError("segmentation: expected whole run lengths, got something else", count)
            if not 0 <= count <= height * width:
                raise SegmentationError("segmentation: expected run lengths of 0 to height x width, got another", count)
        runs = np.array([int(count) for count in counts], np.int64)
    else:
        raise SegmentationError("segmentation: expected run lengths as a list or text, got something else", counts)
    if runs.sum() != height * width:
        reason = "segmentation: expected run lengths that sum to height x width, got another sum"
        raise SegmentationError(reason, int(runs.sum()))
    borders = _odd(np.cumsum(runs[:-1]))
    return borders if len(borders) % 2 == 0 else np.append(borders, height * width)


def _unpacked(text: str | bytes, pixels: int) -> np.ndarray:
    """Run lengths (N,) int64 of COCO's packed text: 5 bits a character, and a sixth where the number goes on.

    From the fourth number on, each is the difference to the number two before.
    """
    packed = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    values = np.frombuffer(packed, np.uint8).astype(np.int64) - 48
    if ((values < 0) | (values > 63)).any():
        raise SegmentationError("segmentation: expected packed run lengths of characters 0 to o, got others", text)
    goes_on = values >= 32
    ends = np.flatnonzero(~goes_on)
    lengths = np.diff(ends, prepend=-1)
    # Twelve characters hold 60 bits. Whoever packs fewer pixels than 2^30 needs seven.
    if (len(values) and goes_on[-1]) or (lengths > 12).any():
        raise SegmentationError("segmentation: expected packed run lengths, got a number that does not end", text)
    digit = np.arange(len(values)) - np.repeat(ends - lengths + 1, lengths)
    number = np.repeat(np.arange(len(ends)), lengths)
    runs = np.zeros(len(ends), np.int64)
    np.add.at(runs, number, (values & 31) << (5 * digit))
    negative = values[ends] & 16 != 0
    runs[negative] -= np.int64(1) << (5 * lengths[negative])
    if (np.abs(runs) <= pixels).all():
        runs[1::2] = np.cumsum(runs[1::2])
        runs[2::2] = np.cumsum(runs[2::2])
        if ((runs >= 0) & (runs <= pixels)).all():
            return runs
    raise SegmentationError("segmentation: expected run lengths of 0 to height x width, got another", text)
