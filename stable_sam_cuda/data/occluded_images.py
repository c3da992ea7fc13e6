"""Occluded pictures as samples: recipes that always give the same picture."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stable_sam_cuda.data.occlusion import Cutout, Occlusion, cut_out, occlude
from stable_sam_cuda.data.samples import Sample

TARGET_AREA = 0.005  # of the picture, at least
CUTOUT_AREA = 0.01  # of its picture, at least; smaller ones would be enlarged into blurs
CUTOUT_FILL = 0.3  # of its bounding box, at least: no threads and rings
MINIMUM_PIXELS = 400  # of target and cut-out
SYNTHESIS = 1  # to be raised when the same recipe gives another picture, so that cached embeddings are not mistaken
DRAWS = 40  # pictures that are looked at for each occluded one


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
