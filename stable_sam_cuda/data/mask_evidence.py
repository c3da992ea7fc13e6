"""Whether the values of masks look like ids of objects, or like shades of one object's soft edges.

The values of a set of masks are counted with how their pixels lie. A value is an *object's* where a fifth of its pixels
has four neighbours of its own and it is no step of a slope (a step lies between the next values up and down), or where
it lies alone on the background. Edges hold many values, hardly any of them an object's, and most of the foreground is
near the brightest value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINARY, INSTANCES, VOID = "binary", "instances", "void"

LEAST_WHITE = 64  # masks whose brightest value is below hold ids, unless they are nothing but a slope of shades
MANY_SHADES = 20
LEAST_BACKGROUND = 0.15  # ids that fill a picture evenly leave a tenth
LOW, HIGH = 0.1, 0.9  # of the brightest value: below lies the noise of compression, above what counts as white
HARDLY = 0.2  # of the pixels in squares of one value: strokes so thin that all of them is edge
MAX_PIXELS = 16_000_000  # of a mask, its middle rows, that are looked at
VOID_GAP = 32  # so many values below a void border's are free


class Verdict(NamedTuple):
    """What masks seem to mean; ``sure`` where the evidence leaves no doubt."""

    meaning: str
    sure: bool


class Evidence(NamedTuple):
    """For each value but 0: its pixels, how many lie inside, and the pairs of neighbours that it forms with others.

    Args:
        values: (N,) ascending.
        counts: (N, 6) pixels, those with four equal neighbours, those in a 2 x 2 square of one value, pairs with
            other values, of them pairs with 0, of them pairs with the next two values up or down, if near.
        gentle, pairs: pairs of neighbours of different values, none of them 0, and how many differ by less than a
            quarter of the brightest.
        background: share of the pixels that are 0 or next to it: up to `LOW` of the brightest value.
    """

    values: np.ndarray
    counts: np.ndarray
    gentle: int
    pairs: int
    background: float


def evidence_of(mask: np.ndarray) -> Evidence:
    """Evidence of one mask (H, W) of whole numbers."""
    background = float((mask <= LOW * mask.max()).mean())
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Evidence(np.zeros(0, mask.dtype), np.zeros((0, 6), np.int64), 0, 0, 1.0)
    top, left = max(0, rows[0] - 1), max(0, columns[0] - 1)
    mask = mask[top : rows[-1] + 2, left : columns[-1] + 2]
    if mask.size > MAX_PIXELS:
        kept = max(1, MAX_PIXELS // mask.shape[1])
        mask = mask[(len(mask) - kept) // 2 :][:kept]
    found = np.unique(mask)
    rank = np.searchsorted(found, mask).astype(np.int32)
    # Outside the picture each pixel goes on: an object that is cut off is no smaller for it.
    wide = np.pad(rank, 1, mode="edge")
    inside = (wide[:-2, 1:-1] == rank) & (wide[2:, 1:-1] == rank)
    inside &= (wide[1:-1, :-2] == rank) & (wide[1:-1, 2:] == rank)
    square = (rank[:-1, :-1] == rank[1:, 1:]) & (rank[:-1, 1:] == rank[1:, :-1]) & (rank[:-1, :-1] == rank[:-1, 1:])
    in_square = np.zeros(rank.shape, bool)
    for part in (in_square[:-1, :-1], in_square[1:, 1:], in_square[:-1, 1:], in_square[1:, :-1]):
        part |= square
    counts = np.zeros((len(found), 6), np.int64)
    for place, which in enumerate((rank.ravel(), rank[inside], rank[in_square])):
        counts[:, place] = np.bincount(which, minlength=len(found))
    gentle = pairs = 0
    reach = int(found[-1]) - min(0, int(found[0]))
    for first, second in ((rank[:, :-1], rank[:, 1:]), (rank[:-1], rank[1:])):
        apart = first != second
        first, second = first[apart], second[apart]
        zero_first, zero_second = found[first] == 0, found[second] == 0
        steps = abs(found[first].astype(np.int64) - found[second])
        shades = ~zero_first & ~zero_second
        smooth = shades & (abs(first - second) <= 2) & (steps <= 0.1 * reach)
        for one, other_is_zero in ((first, zero_second), (second, zero_first)):
            for place, which in ((3, one), (4, one[other_is_zero]), (5, one[smooth])):
                counts[:, place] += np.bincount(which, minlength=len(found))
        gentle, pairs = gentle + int((steps[shades] <= reach / 4).sum()), pairs + int(shades.sum())
    return Evidence(found[found != 0], counts[found != 0], gentle, pairs, background)


def pooled(parts: Sequence[Evidence]) -> Evidence:
    """Evidence of several masks as of one."""
    values, place = np.unique(np.concatenate([part.values for part in parts]), return_inverse=True)
    counts = np.zeros((len(values), 6), np.int64)
    np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
    gentle, pairs = sum(part.gentle for part in parts), sum(part.pairs for part in parts)
    return Evidence(values, counts, gentle, pairs, float(np.mean([part.background for part in parts])))


def verdict_of(evidence: Evidence) -> Verdict | None:
    """What the values seem to mean; None where there are fewer than two, so that both readings are the same."""
    values = evidence.values
    if len(values) < 2:
        return None
    if values[0] < 0:
        return Verdict(INSTANCES, True)
    pixels, inside, in_square, outward, to_zero, smooth = evidence.counts.T
    solid = (inside >= 0.2 * pixels) & (smooth < 0.8 * outward)
    alone = (to_zero >= 0.8 * outward) & (outward > 0)
    low, high = values <= LOW * values[-1], values >= HIGH * values[-1]
    # The noise of compression lies alone or in flat blocks, too, but hardly ever in squares, and most of it in neither.
    low_objects = low & (solid | alone & (2 * in_square >= pixels))
    if 2 * low_objects.sum() < low.sum():
        low_objects[:] = False
    middle = ~low & ~high
    if middle.sum() < 0.1 * len(values):
        middle &= solid
    counted = middle | low_objects
    # Shades that fall off to a background, without a white inside: an object that is blurred as a whole. Tiny objects
    # side by side lie in squares of one value, whose neighbours are others than the next values up and down.
    slope = evidence.background > LEAST_BACKGROUND and evidence.gentle >= 0.8 * max(evidence.pairs, 1)
    slope = slope and (in_square.sum() < 0.9 * pixels.sum() or smooth.sum() >= 0.8 * (outward - to_zero).sum())
    objects = (solid | alone)[counted].mean() if counted.any() else 0.0
    if values[-1] < LEAST_WHITE:
        dark = len(values) >= MANY_SHADES and objects <= 0.1 and slope
        return Verdict(BINARY if dark else INSTANCES, not dark)
    if evidence.background == 0 and 2 * (inside >= 0.5 * pixels).sum() > len(values):
        return Verdict(INSTANCES, False)  # regions that fill the picture: one object would leave no background
    if not counted.any():
        # Ids that are close to each other: noise near white lies in it and at its rim, never by itself.
        if (solid & alone)[high].sum() >= 2:
            return Verdict(INSTANCES, True)
        bright = int((solid | alone)[high].sum())
        return Verdict(INSTANCES if bright > 2 and 2 * bright > high.sum() else BINARY, bright < 2)
    if objects >= 0.5:
        return Verdict(INSTANCES, True)
    white = pixels[high].sum() / pixels[~low].sum()
    if white >= 0.5:
        return Verdict(BINARY, bool(objects <= 0.25))
    thin = len(values) >= MANY_SHADES and evidence.background > LEAST_BACKGROUND
    thin = thin and in_square.sum() <= HARDLY * pixels.sum()
    return Verdict(BINARY if objects <= 0.25 and (slope or thin) else INSTANCES, False)


def verdict_of_set(parts: Sequence[Evidence]) -> Verdict | None:
    """What a set of masks seems to mean: what most of them say that leave no doubt, else all of them pooled."""
    verdicts = [verdict_of(part) for part in parts]
    binary, instances = (
        sum(one is not None and one.sure and one.meaning == meaning for one in verdicts)
        for meaning in (BINARY, INSTANCES)
    )
    if binary == instances:
        verdict = verdict_of(pooled(parts)) if parts else None
        return verdict and Verdict(verdict.meaning, verdict.sure and not binary)
    fewer, more = sorted((binary, instances))
    return Verdict(BINARY if binary > instances else INSTANCES, 2 * fewer <= more)


def is_void(parts: Sequence[Evidence], void: int) -> bool:
    """Whether ``void``, the largest value of the type, is a border between ids and not an id itself."""
    values = pooled(parts).values if parts else np.zeros(0)
    others = values[values != void]
    if len(others) == len(values) or not len(others) or others[0] < 1:
        return False
    runs_from_1 = others[-1] <= void - VOID_GAP and 2 * len(others) >= others[-1]
    with_objects = [part.values for part in parts if len(part.values)]
    with_void = [found for found in with_objects if found[-1] == void]
    beside_others = all(len(found) > 1 for found in with_void)
    return bool(runs_from_1 and beside_others and 2 * len(with_void) >= len(with_objects))


def may_be_void(parts: Sequence[Evidence], void: int) -> bool:
    """Whether ``void`` lies beside other ids that do not run up to it, counted in their own steps."""
    values = pooled(parts).values if parts else np.zeros(0, np.int64)
    if len(values) < 2 or values[-1] != void or values[0] < 0:
        return False
    return bool(values[-2] != void - np.gcd.reduce(values.astype(np.int64)))
