"""Synthetic occlusion: an object cut out of one picture and pasted over an object of another.

The paper trains on such pictures but does not say how they are made. Here a cut-out comes in from a random side and
stops where it hides the wanted part of the target. The target's mask is what remains visible, unless the whole
object is asked for: the paper leaves that open, too, and SAM's masks are of what is seen.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from stable_sam_cuda.data.samples import Sample

INSET, FEATHER = 0.5, 2.0  # pixels: the cut-out's rim is left away, behind it opacity grows from 0 to 1
OPAQUE = 0.5  # a pixel counts as hidden from this opacity on
SIZE = (0.5, 1.6)  # of the cut-out, as multiples of the target's area
GROWTH, GROWTHS = 1.3, 6  # a cut-out that hides too little in the best place is enlarged, so often
TRIES = 10  # places from which a cut-out comes in
BISECTIONS = 16  # of its way: 1 / 65536 of it is left open

# Of occluded pictures as samples: recipes that always give the same picture.
TARGET_AREA = 0.005  # of the picture, at least
CUTOUT_AREA = 0.01  # of its picture, at least; smaller ones would be enlarged into blurs
CUTOUT_FILL = 0.3  # of its bounding box, at least: no threads and rings
MINIMUM_PIXELS = 400  # of target and cut-out
SYNTHESIS = 1  # to be raised when the same recipe gives another picture, so that cached embeddings are not mistaken
DRAWS = 40  # pictures that are looked at for each occluded one


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


@dataclass(frozen=True)
class OccludedImage:
    """Object ``target`` of ``base`` behind object ``donor_target`` of ``donor``.

    The result has one object: what is visible of the target, or, with ``whole``, all of it.
    """

    base: Sample
    target: int
    donor: Sample
    donor_target: int
    seed: int
    hidden: tuple[float, float]
    whole: bool = False

    @property
    def name(self) -> str:
        """The picture's name with a digest of the recipe: pictures that differ have different names."""
        recipe = (SYNTHESIS, self.base.name, self.target, self.donor.name, self.donor_target, self.seed, self.hidden)
        return f"{self.base.name}+{_hashed(recipe)[:12]}"

    @property
    def set_name(self) -> str:
        return self.base.set_name

    @property
    def parts(self) -> tuple[Sample, ...]:
        """The samples that it is made of."""
        return self.base, self.donor

    def picture_digest(self) -> str:
        """SHA-256, in hexadecimal digits, of the recipe and of base and donor: their objects shape the picture too.

        Raises:
            ValueError, OSError: a file cannot be read.
        """
        return self.made_picture_digest([part.digest() for part in self.parts])

    def digest(self) -> str:
        """The same, and whether the hidden part belongs to the object.

        Raises:
            ValueError, OSError: a file cannot be read.
        """
        return self.made_digest([part.digest() for part in self.parts])

    def made_picture_digest(self, parts: Sequence[str]) -> str:
        """`picture_digest`, where the digests of base and donor are known."""
        return _hashed(("occluded", SYNTHESIS, self.target, self.donor_target, self.seed, self.hidden, *parts))

    def made_digest(self, parts: Sequence[str]) -> str:
        """`digest`, where the digests of base and donor are known."""
        return _hashed((self.made_picture_digest(parts), self.whole))

    def occlusion(self) -> tuple[Occlusion, np.ndarray]:
        """The occluded picture, and the target's whole mask (H, W) bool.

        Raises:
            ValueError, OSError: as the loading of base and donor, or as `occlude`.
        """
        image, ids = self.base.load()
        mask = ids == self.target
        donor_image, donor_ids = self.donor.load()
        cutout = cut_out(donor_image, donor_ids == self.donor_target)
        return occlude(image, mask, cutout, np.random.default_rng(self.seed), self.hidden), mask

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) RGB uint8 and ids (H, W) uint8: 1 the target, 0 everything else.

        Raises:
            ValueError, OSError: as `occlusion`.
        """
        occlusion, mask = self.occlusion()
        return occlusion.image, (mask if self.whole else occlusion.visible).astype(np.uint8)


def occluded_images(
    samples: Sequence[Sample],
    count: int,
    seed: int = 0,
    *,
    hidden: tuple[float, float] = (0.1, 0.5),
    whole: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> list[OccludedImage]:
    """``count`` occluded pictures made of ``samples``, in the order of a random walk through them.

    Targets have at least `TARGET_AREA` of the picture. Cut-outs have at least `CUTOUT_AREA` of theirs and fill
    `CUTOUT_FILL` of their box, and do not touch the rim, where the picture's edge would have cut them.

    Args:
        hidden, whole: as in `OccludedImage`.
        progress: hears of each picture that is found.

    Raises:
        ValueError: there are not enough such objects.
        OSError: a picture cannot be read.
    """
    rng = np.random.default_rng(seed)
    found: list[OccludedImage] = []
    order: list[int] = []
    for _ in range(DRAWS * count):
        if len(found) == count:
            break
        order = order or rng.permutation(len(samples)).tolist()
        base, donor = samples[order.pop()], samples[int(rng.integers(len(samples)))]
        recipe_seed = int(rng.integers(2**32))
        target, donor_target = _drawn(targets(base), rng), _drawn(cutouts(donor), rng)
        if base.name == donor.name or target is None or donor_target is None:
            continue
        candidate = OccludedImage(base, target, donor, donor_target, recipe_seed, hidden, whole)
        try:
            candidate.occlusion()
        except ValueError:  # this cut-out cannot hide this target: the next one may
            continue
        found.append(candidate)
        progress(1)
    if len(found) < count:
        raise ValueError(
            f"occlusions: expected {count} pictures with objects to hide and to cut out among {len(samples)}, "
            f"found {len(found)}"
        )
    return found


def targets(sample: Sample) -> list[int]:
    """Ids of the objects that are large enough to be partly hidden."""
    _, ids = sample.load()
    counts = np.bincount(ids.ravel(), minlength=1)
    counts[0] = 0
    return np.flatnonzero(counts >= max(MINIMUM_PIXELS, TARGET_AREA * ids.size)).tolist()


def cutouts(sample: Sample) -> list[int]:
    """Ids of the objects that make good cut-outs."""
    image, ids = sample.load()
    rim = set(np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]]).tolist())
    counts = np.bincount(ids.ravel(), minlength=1)
    large = np.flatnonzero(counts >= max(MINIMUM_PIXELS, CUTOUT_AREA * ids.size))
    return [
        object_id
        for object_id in large.tolist()
        if object_id not in rim | {0} and _fill(cut_out(image, ids == object_id)) >= CUTOUT_FILL
    ]


def _fill(cutout: Cutout) -> float:
    return float(cutout.mask[1:-1, 1:-1].mean())


def _drawn(choices: list[int], rng: np.random.Generator) -> int | None:
    return int(rng.choice(choices)) if choices else None


def _hashed(recipe: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(recipe).encode()).hexdigest()
