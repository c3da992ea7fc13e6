"""Where a training step has its pictures from: cached embeddings, or the image encoder itself, with gradient."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.data.dataset import fit_square, object_masks
from stable_sam_cuda.data.digests import Digests
from stable_sam_cuda.data.embeddings import EmbeddingCache
from stable_sam_cuda.data.samples import Sample

Item = TypeVar("Item")


@dataclass
class Example:
    """One picture on the CPU, in SAM's input frame of S px.

    masks (K, S, S) bool, one an object; content: the embedding (1, C, h, w), or pixels (1, 3, S, S) uint8.
    """

    masks: Tensor
    content: Tensor


class PictureSource(Protocol):
    """Pictures by number; `example` may run in another thread than `embedding`."""

    samples: list[Sample]
    digests: Digests  # of the samples, as far as they are known

    def example(self, index: int) -> Example:
        """Read one picture."""

    def embedding(self, example: Example) -> Tensor:
        """The picture's embedding (1, C, h, w) on SAM's device."""


class CachedPictures:
    """Embeddings that were computed before: the encoder stays as it is."""

    def __init__(self, sam: Sam, cache: EmbeddingCache) -> None:
        self.sam, self.cache, self.samples, self.digests = sam, cache, cache.samples, cache.digests

    def example(self, index: int) -> Example:
        """Masks from disk, the embedding from the cache."""
        _, ids = fit_square(*self.samples[index].load(), self.sam.image_encoder.img_size)
        return Example(stacked_masks(ids), self.cache[[index]])

    def embedding(self, example: Example) -> Tensor:
        """The cached one, without gradient."""
        return example.content.to(self.sam.device, non_blocking=True)


class EncodedPictures:
    """Embeddings computed in each step, so that the encoder can learn."""

    def __init__(self, sam: Sam, samples: list[Sample], digests: Digests | None = None) -> None:
        self.sam, self.samples, self.digests = sam, samples, digests or Digests()

    def example(self, index: int) -> Example:
        """Picture and masks from disk."""
        image, ids = fit_square(*self.samples[index].load(), self.sam.image_encoder.img_size)
        return Example(stacked_masks(ids), torch.from_numpy(image).permute(2, 0, 1)[None])

    def embedding(self, example: Example) -> Tensor:
        """The encoder's, with gradient."""
        pixels = example.content.to(self.sam.device, non_blocking=True).float()
        return self.sam.image_encoder(self.sam.preprocess(pixels))


def stacked_masks(ids: np.ndarray) -> Tensor:
    """Object ids (S, S) -> masks (K, S, S) bool."""
    found = object_masks(ids)
    return torch.stack([torch.from_numpy(mask) for mask in found]) if found else torch.zeros(0, *ids.shape) > 0


def prefetched(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items in the same order, the next one being prepared while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        pending = worker.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = worker.submit(next, items, None)
            yield item
