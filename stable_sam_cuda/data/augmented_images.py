"""Augmented variants of pictures as samples: flip and large-scale jitter, always the same for the same name."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stable_sam_cuda.data.augment import augmented
from stable_sam_cuda.data.samples import Sample

SCALES = (0.1, 2.0)  # HQ-SAM's large-scale jitter
AUGMENTATION = 1  # to be raised when a variant becomes another picture, so that cached embeddings are not mistaken


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
