"""Inputs of the GPU decoder benchmark: random embeddings and one box a prompt, which makes 7 tokens, as in the
attention's benchmark, so that kernels compiled there serve here."""

from typing import NamedTuple

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.training.decoding import PromptBatch

TOKENS = 7


class Prompts(NamedTuple):
    """So many boxes on one picture, as the decoder takes them."""

    image: Tensor  # (1, C, h, w)
    image_pe: Tensor  # (1, C, h, w)
    sparse: Tensor  # (B, 2, C)
    dense: Tensor  # (B, C, h, w), one embedding repeated without memory, as SAM's prompt encoder gives it


class TrainingBatch(NamedTuple):
    """Cached embeddings of some pictures, and as many objects of each."""

    embeddings: Tensor  # (I, C, h, w)
    prompts: PromptBatch  # of K objects
    targets: Tensor  # (K, 1, side, side), 0 or 1, in the input frame

    def to(self, dtype: torch.dtype) -> "TrainingBatch":
        return self._replace(embeddings=self.embeddings.to(dtype), targets=self.targets.to(dtype))


def boxes(count: int, side: int, device: torch.device) -> Tensor:
    """Random boxes (count, 4) in a frame of ``side`` pixels, each an eighth of it long at least."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) / 2
    size = 1 / 8 + torch.rand(count, 2, generator=generator) * 3 / 8
    return (side * torch.cat([corner, corner + size], dim=1)).to(device)


def normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def make_prompts(sam: Sam, count: int, dtype: torch.dtype) -> Prompts:
    """For a model whose prompt encoder is in float32, as it should be."""
    encoder = sam.prompt_encoder
    sparse, dense = encoder(points=None, boxes=boxes(count, sam.image_encoder.img_size, sam.device), masks=None)
    image_pe = encoder.get_dense_pe()
    image = normal(tuple(image_pe.shape), sam.device)
    repeated = dense[:1].to(dtype).expand(dense.shape)
    return Prompts(image.to(dtype), image_pe.to(dtype), sparse.to(dtype), repeated)


def make_training_batch(sam: Sam, pictures: int, objects: int) -> TrainingBatch:
    side, count = sam.image_encoder.img_size, pictures * objects
    corners = boxes(count, side, sam.device)
    pixels = torch.arange(side, device=sam.device)
    x0, y0, x1, y1 = corners[:, :, None].unbind(1)
    inside = ((pixels >= x0) & (pixels < x1))[:, None, :] & ((pixels >= y0) & (pixels < y1))[:, :, None]
    embeddings = normal(
        (pictures, sam.mask_decoder.transformer_dim, *sam.prompt_encoder.image_embedding_size), sam.device
    )
    index = torch.arange(pictures, device=sam.device).repeat_interleave(objects)
    return TrainingBatch(embeddings, PromptBatch(index, boxes=corners), inside[:, None].float())


def make_picture(side: int) -> np.ndarray:
    """(3/4 side, side, 3) of uint8: noise, which resizing blurs."""
    return np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
