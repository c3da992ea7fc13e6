"""Digests of what samples hold, each file being read once by several threads; and seeds that follow from names."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.notes import printable


@runtime_checkable
class MadeSample(Protocol):
    """A sample that a recipe makes of others."""

    @property
    def parts(self) -> tuple[Sample, ...]:
        """The samples that it is made of."""

    def made_picture_digest(self, parts: Sequence[str]) -> str:
        """Its `picture_digest`, from the `digest` of each part."""

    def made_digest(self, parts: Sequence[str]) -> str:
        """Its `digest`, from the `digest` of each part."""


def content_digest(samples: Sequence[Sample]) -> str:
    """One SHA-256 over names and contents of samples, in their order; a sample that cannot be read counts as such."""

    def digest(sample: Sample) -> str:
        try:
            return sample.digest()
        except (OSError, ValueError) as error:
            return type(error).__name__

    total = hashlib.sha256()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers:
        for sample, found in zip(samples, workers.map(digest, samples), strict=True):
            total.update(f"{printable(sample.name)}\n{found}\n".encode())
    return total.hexdigest()


class Digests:
    """Digests of samples as they were when they were first asked for.

    A sample that many others are made of is read once for all of them.
    """

    def __init__(self) -> None:
        # By identity, with the sample, so that no other one takes its place: not every sample can be hashed.
        self._known: dict[tuple[int, bool], tuple[Sample, str]] = {}

    def of_pictures(self, samples: Sequence[Sample]) -> list[str]:
        """The `picture_digest` of each sample.

        Raises:
            ValueError, OSError: a file cannot be read.
        """
        return self._all(samples, False)

    def of_samples(self, samples: Sequence[Sample]) -> list[str]:
        """The `digest` of each sample, of picture and objects.

        Raises:
            ValueError, OSError: a file cannot be read.
        """
        return self._all(samples, True)

    def replace_picture(self, sample: Sample, digest: str) -> None:
        """The sample's picture has changed."""
        self._known[id(sample), False] = sample, digest

    def _all(self, samples: Sequence[Sample], objects: bool) -> list[str]:
        made = [sample for sample in samples if isinstance(sample, MadeSample)]
        parts = dict(zip(map(id, made), self._parts(made), strict=True))
        missing = {id(sample): sample for sample in samples if (id(sample), objects) not in self._known}

        def digest(sample: Sample) -> str:
            if isinstance(sample, MadeSample):
                own = parts[id(sample)]
                return sample.made_digest(own) if objects else sample.made_picture_digest(own)
            return sample.digest() if objects else sample.picture_digest()

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers:
            for sample, found in zip(missing.values(), workers.map(digest, missing.values()), strict=True):
                self._known[id(sample), objects] = sample, found
        return [self._known[id(sample), objects][1] for sample in samples]

    def _parts(self, made: Sequence[MadeSample]) -> list[list[str]]:
        """The digests of each made sample's parts."""
        found = iter(self.of_samples([part for sample in made for part in sample.parts]) if made else [])
        return [[next(found) for _ in sample.parts] for sample in made]


def seed_of(*parts: str | int | tuple[float, ...]) -> int:
    """A seed for `torch.Generator` that any other part, or another order, changes; the same on every machine.

    It is hashed, because PyTorch's generator on the CPU looks at the last 32 bits of a seed alone.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
