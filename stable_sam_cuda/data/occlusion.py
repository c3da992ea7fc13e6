"""Synthetic occlusion: an object cut out of one picture and pasted over an object of another.

The paper trains on such pictures but does not say how they are made. Here a cut-out comes in from a random side and
stops where it hides the wanted part of the target. The target's mask is what remains visible, unless the whole
object is asked for: the paper leaves that open, too, and SAM's masks are of what is seen.
"""

from dataclasses import dataclass

import cv2
import numpy as np

INSET, FEATHER = 0.5, 2.0  # pixels: the cut-out's rim is left away, behind it opacity grows from 0 to 1
OPAQUE = 0.5  # a pixel counts as hidden from this opacity on
SIZE = (0.5, 1.6)  # of the cut-out, as multiples of the target's area
GROWTH, GROWTHS = 1.3, 6  # a cut-out that hides too little in the best place is enlarged, so often
TRIES = 10  # places from which a cut-out comes in
BISECTIONS = 16  # of its way: 1 / 65536 of it is left open


@dataclass(frozen=True)
class Cutout:
    """An object without its surroundings: picture (h, w, 3) RGB uint8, mask (h, w) bool with a margin of one pixel.

    Around the object the picture goes on in the colours of its rim.
    """

    image: np.ndarray
    mask: np.ndarray

    def scaled(self, factor: float) -> "Cutout":
        """The cut-out with its sides multiplied by ``factor``."""
        size = [max(3, round(side * factor)) for side in self.mask.shape[::-1]]
        interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        share = cv2.resize(self.mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        if factor > 1:  # else the old pixels' corners would show as stairs
            share = cv2.GaussianBlur(share, (0, 0), 0.6 * factor)
        mask = share > 0.5
        mask[[0, -1]] = mask[:, [0, -1]] = False
        return Cutout(cv2.resize(self.image, size, interpolation=interpolation), mask)

    def mirrored(self) -> "Cutout":
        """The cut-out with left and right exchanged."""
        return Cutout(self.image[:, ::-1], self.mask[:, ::-1])

    def depth(self) -> np.ndarray:
        """Distance (h, w) float32 of each pixel of the object to its outside."""
        return cv2.distanceTransform(self.mask.astype(np.uint8), cv2.DIST_L2, 5)

    def opacity(self) -> np.ndarray:
        """Opacity (h, w) float32 in [0, 1]: zero outside, feathered at the inner edge."""
        return np.clip((self.depth() - INSET) / FEATHER, 0, 1)


def cut_out(image: np.ndarray, mask: np.ndarray) -> Cutout:
    """The object of mask (H, W) bool in a picture (H, W, 3) as a cut-out.

    Raises:
        ValueError: the mask is empty, or of another size than the picture.
    """
    _check(image, mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    margin = ((1, 1), (1, 1))
    own = np.pad(mask[part], margin)
    picture = np.pad(image[part], (*margin, (0, 0)), mode="edge")
    # Outside, each pixel takes the nearest one of the object, so that scaling mixes no surroundings into its rim.
    labels = cv2.distanceTransformWithLabels((~own).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    nearest = np.zeros((labels.max() + 1, 3), np.uint8)
    nearest[labels[own]] = picture[own]
    return Cutout(nearest[labels], own)


@dataclass(frozen=True)
class Occlusion:
    """A picture (H, W, 3) with its target partly hidden; what is left of it, ``visible`` (H, W) bool.

    ``hidden`` is the part of the target's pixels that is hidden, in [0, 1].
    """

    image: np.ndarray
    visible: np.ndarray
    hidden: float


def occlude(
    image: np.ndarray,
    mask: np.ndarray,
    cutout: Cutout,
    rng: np.random.Generator,
    hidden: tuple[float, float] = (0.1, 0.5),
) -> Occlusion:
    """Paste ``cutout`` over a part of the object of ``mask`` (H, W) bool in a picture (H, W, 3) uint8.

    Args:
        hidden: range of the part of the object that is hidden; uniform in it.

    Raises:
        ValueError: the range is not within (0, 1), the mask is empty or of another size than the picture, or the
            cut-out cannot hide so much and no more: the object is a few pixels, the cut-out a thread.
    """
    _check(image, mask)
    low, high = hidden
    if not 0 < low <= high < 1:
        raise ValueError(f"hidden: expected 0 < low <= high < 1, got {hidden}")
    area = int(mask.sum())
    for _ in range(TRIES):
        wanted = rng.uniform(low, high)
        size = rng.uniform(max(SIZE[0], 1.2 * wanted), SIZE[1])
        placed = _place(mask, cutout.mirrored() if rng.random() < 0.5 else cutout, wanted, size, rng)
        if placed is None:
            continue
        pasted, corner = placed
        opacity = _framed(pasted.opacity(), corner, mask.shape)
        visible = mask & (opacity < OPAQUE)
        part = 1 - visible.sum() / area
        if low <= part <= high:
            return Occlusion(_blend(image, _framed(pasted.image, corner, mask.shape), opacity), visible, float(part))
    raise ValueError(f"cutout: expected one that can hide {low} to {high} of an object of {area} pixels, got none")


def _place(
    mask: np.ndarray, cutout: Cutout, wanted: float, size: float, rng: np.random.Generator
) -> tuple[Cutout, tuple[int, int]] | None:
    """The scaled cut-out and its top left corner, where it hides the part ``wanted`` of the mask; None: nowhere.

    The cut-out's deepest pixel moves away from the mask's centre in a random direction. There it hides enough, or
    grows until it does; far out it hides nothing; bisection finds the place in between.
    """
    area = mask.sum()
    centre = np.argwhere(mask).mean(0)
    angle = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.sin(angle), np.cos(angle)])
    for growth in range(GROWTHS + 1):
        scaled = cutout.scaled(np.sqrt(size * area / cutout.mask.sum()) * GROWTH**growth)
        opaque = scaled.opacity() >= OPAQUE
        anchor = np.array(np.unravel_index(scaled.depth().argmax(), opaque.shape))

        def corner(distance: float, anchor: np.ndarray = anchor) -> tuple[int, int]:
            y, x = np.rint(centre + distance * direction - anchor).astype(int)
            return int(y), int(x)

        def hidden(distance: float, opaque: np.ndarray = opaque) -> float:
            return _overlap(mask, opaque, corner(distance)) / area

        if hidden(0) < wanted:
            continue
        near, far = 0.0, float(np.hypot(*mask.shape) + np.hypot(*opaque.shape))
        for _ in range(BISECTIONS):
            middle = (near + far) / 2
            near, far = (middle, far) if hidden(middle) >= wanted else (near, middle)
        return scaled, corner(min(near, far, key=lambda distance: abs(hidden(distance) - wanted)))
    return None


def _windows(corner: tuple[int, int], size: tuple[int, ...], frame: tuple[int, ...]) -> tuple[tuple, tuple]:
    """The slices of a frame and of a picture of ``size``, whose top left lies at ``corner``, that meet."""
    inside, own = [], []
    for start, length, limit in zip(corner, size, frame, strict=False):
        first, last = max(0, start), max(0, min(limit, start + length))
        inside.append(slice(first, max(first, last)))
        own.append(slice(first - start, max(first, last) - start))
    return tuple(inside), tuple(own)


def _overlap(mask: np.ndarray, opaque: np.ndarray, corner: tuple[int, int]) -> int:
    inside, own = _windows(corner, opaque.shape, mask.shape)
    return int((mask[inside] & opaque[own]).sum())


def _framed(values: np.ndarray, corner: tuple[int, int], frame: tuple[int, ...]) -> np.ndarray:
    """``values`` at their place in an empty array of the frame's size."""
    inside, own = _windows(corner, values.shape, frame)
    framed = np.zeros((*frame, *values.shape[2:]), values.dtype)
    framed[inside] = values[own]
    return framed


def _blend(image: np.ndarray, pasted: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    opacity = opacity[..., None]
    return np.rint(image * (1 - opacity) + pasted * opacity).astype(np.uint8)


def _check(image: np.ndarray, mask: np.ndarray) -> None:
    if image.shape[:2] != mask.shape or mask.dtype != bool:
        raise ValueError(
            f"mask: expected booleans of the picture's size {image.shape[:2]}, got {mask.dtype} of {mask.shape}"
        )
    if not mask.any():
        raise ValueError("mask: expected at least one pixel, got an empty mask")
