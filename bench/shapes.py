"""Sizes that matter, and random inputs of those sizes: never zeros, whose offsets would all be integers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplerShape:
    """One deformable_sample call; the defaults are SAM's image embedding at 1024 pixels."""

    batch: int
    channels: int = 256
    height: int = 64
    width: int = 64
    max_offset: float = 1.0

    def __str__(self) -> str:
        return f"B={self.batch} C={self.channels} {self.height}x{self.width} s={self.max_offset:g}"

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """features, offsets, identity, alpha in NCHW."""
        generator = torch.Generator().manual_seed(seed)
        image = (self.batch, self.channels, self.height, self.width)
        shapes = [image, (self.batch, 2, self.height, self.width), image, (self.batch, 2)]
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def grad_output(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((self.batch, self.channels, self.height, self.width), generator=generator).to(dtype)


def channels_last(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and t.shape[1] > 2 else t for t in tensors]
