"""Augmented variants of pictures as samples: flip and large-scale jitter, always the same for the same name."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stable_sam_cuda.training.augment import augmented
from stable_sam_cuda.training.samples import Sample

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
    def set_name(self) -> str:
        return self.base.set_name

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (S, S, 3) RGB uint8 and ids (S, S).

        Raises:
            ValueError, OSError: as the loading of ``base``.
        """
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big"))
        return augmented(*self.base.load(), self.size, rng, SCALES, recolour=False)


def augmented_images(samples: Sequence[Sample], variants: int, size: int, seed: int) -> list[AugmentedImage]:
    """``variants`` of each sample; all first variants come first."""
    return [AugmentedImage(sample, variant, size, seed) for variant in range(variants) for sample in samples]
