"""Augmentation of training pictures: flip, large-scale jitter and colour; variants as samples; pasted objects.

Copy-paste (Ghiasi et al., 2021) cuts objects out of one picture and pastes them onto another.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stable_sam_cuda.data.dataset import crop_square, fit_square, object_masks
from stable_sam_cuda.data.samples import Sample

SCALES = (0.1, 2.0)  # HQ-SAM's large-scale jitter
AUGMENTATION = 1  # to be raised when a variant becomes another picture, so that cached embeddings are not mistaken

PASTED_OBJECTS = 2
PASTED_AREAS = (0.005, 0.25)  # of the frame: what is smaller teaches little, what is larger hides the picture


def augmented(
    image: np.ndarray,
    ids: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scales: tuple[float, float] = (0.5, 2.0),
    recolour: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """A flipped, rescaled, cropped and, with ``recolour``, recoloured square window of ``size`` px.

    The scale is log-uniform relative to the picture that just fits; a window without an object
    falls back to the whole picture.
    """
    if rng.random() < 0.5:
        image, ids = image[:, ::-1], ids[:, ::-1]
    image, ids = np.ascontiguousarray(image), np.ascontiguousarray(ids)
    scale = size / max(ids.shape) * np.exp(rng.uniform(*np.log(scales)))
    spare = [max(0, round(side * scale) - size) for side in ids.shape]
    corner = (int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1)))
    window, window_ids = crop_square(image, ids, size, scale, corner)
    if not window_ids.any():
        window, window_ids = fit_square(image, ids, size)
    return _recoloured(window, rng) if recolour else window, window_ids


def _recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random gain and bias a channel, sometimes grey; the padding stays black."""
    padding = ~image.any(axis=2, keepdims=True)
    values = image.astype(np.float32)
    if rng.random() < 0.1:
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)
    gain = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, 3)
    values = (values - 127) * gain.astype(np.float32) + 127 + np.float32(rng.uniform(-25, 25))
    return np.where(padding, 0, values.clip(0, 255)).astype(np.uint8)


@dataclass(frozen=True)
class AugmentedImage:
    """Variant ``variant`` of ``base``: a window of ``size`` px of the picture, flipped or not, at a random scale."""

    base: Sample
    variant: int
    size: int
    seed: int

    @property
    def name(self) -> str:
        """The picture's name, the variant's number, and a digest of what else decides on it."""
        recipe = repr((AUGMENTATION, self.base.name, self.variant, self.size, self.seed))
        return f"{self.base.name}#{self.variant}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"

    @property
    def parts(self) -> tuple[Sample, ...]:
        """The sample that it is made of."""
        return (self.base,)

    def picture_digest(self) -> str:
        """SHA-256, in hexadecimal digits, of the recipe and of ``base``, whose objects choose the window too.

        Raises:
            ValueError, OSError: a file cannot be read.
        """
        return self.made_picture_digest([self.base.digest()])

    def digest(self) -> str:
        """The same: picture and objects are made together."""
        return self.picture_digest()

    def made_picture_digest(self, parts: Sequence[str]) -> str:
        """`picture_digest`, where the digest of ``base`` is known. The variant is drawn by the name, so that counts."""
        recipe = ("augmented", AUGMENTATION, SCALES, self.name, self.variant, self.size, self.seed, *parts)
        return hashlib.sha256(repr(recipe).encode()).hexdigest()

    def made_digest(self, parts: Sequence[str]) -> str:
        """`digest`, where the digest of ``base`` is known."""
        return self.made_picture_digest(parts)

    @property
    def set_name(self) -> str:
        return self.base.set_name

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (S, S, 3) RGB uint8 and ids (S, S).

        Raises:
            ValueError, OSError: as the loading of ``base``.
        """
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(os.fsencode(self.name)).digest()[:8], "big"))
        return augmented(*self.base.load(), self.size, rng, SCALES, recolour=False)


def augmented_images(samples: Sequence[Sample], variants: int, size: int, seed: int) -> list[AugmentedImage]:
    """``variants`` of each sample; all first variants come first."""
    return [AugmentedImage(sample, variant, size, seed) for variant in range(variants) for sample in samples]


def paste_objects(
    image: np.ndarray, ids: np.ndarray, other: np.ndarray, other_ids: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Picture (S, S, 3) and ids (S, S), up to `PASTED_OBJECTS` of the other's objects pasted on top, in their places.

    What a pasted object covers is lost to the objects below it. Pasted objects have ids above all others.
    """
    low, high = (area * ids.size for area in PASTED_AREAS)
    candidates = [mask for mask in object_masks(other_ids) if low <= mask.sum() <= high]
    if not candidates:
        return image, ids
    count = int(rng.integers(1, min(PASTED_OBJECTS, len(candidates)) + 1))
    image, ids = image.copy(), ids.astype(np.int64)
    for index in rng.choice(len(candidates), count, replace=False):
        mask = candidates[index]
        image[mask] = other[mask]
        ids[mask] = ids.max() + 1
    return image, ids
