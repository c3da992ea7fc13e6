"""The model that is measured, plain and stabilised: `sam_lite`, whose prompt encoder and mask decoder are SAM's own."""

from copy import deepcopy
from functools import cache

import torch
from cases import Run
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import load_sam, plugin_of, stabilize, unstabilize
from stable_sam_cuda.sam.lite import EMBED_DIM, IMAGE_SIZE, STRIDE, set_image_size


def image_size(run: Run) -> int:
    """In pixels; a rehearsal's embedding is 8 x 8."""
    return 64 if run.quick else IMAGE_SIZE


def facts(run: Run) -> dict[str, object]:
    """Of prompts that are one box each."""
    side = image_size(run) // STRIDE
    return {"T": 7, "C": EMBED_DIM, "H": side, "W": side, "max_offset": DeformableSampler().max_offset}


@cache
def plain_sam(run: Run, dtype: torch.dtype) -> Sam:
    """The mask decoder converted, the prompt encoder in float32, where coordinates need it."""
    sam = load_sam("sam_lite", device="cpu").requires_grad_(False)
    set_image_size(sam, image_size(run))
    sam.mask_decoder.to(dtype)
    return sam.to(run.device)


@cache
def stable_sam(
    run: Run, dtype: torch.dtype, plugin: type[DeformableSampler] = DeformableSampler, blocks: int = 1
) -> Sam:
    """With a plugin no weight of which is at its initial value: the same weights whatever the class and the blocks."""
    sam = stabilize(copied(plain_sam(run, torch.float32)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plugin_of(sam).parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    sam = with_plugin(sam, plugin, blocks=blocks)
    sam.mask_decoder.to(dtype)
    return sam


def copied(sam: Sam) -> Sam:
    """With the image encoder itself, which nothing here changes, and which is most of the model."""
    return deepcopy(sam, {id(sam.image_encoder): sam.image_encoder})


def with_plugin(sam: Sam, plugin: type[DeformableSampler], **config: object) -> Sam:
    """A copy whose plugin, of the same weights, is of another class or configuration."""
    copy = copied(sam)
    old = plugin_of(copy)
    new = plugin(**old.config() | config).to(sam.device)
    new.load_state_dict(old.state_dict())
    return stabilize(unstabilize(copy), new)


def with_reference(sam: Sam) -> Sam:
    """A copy whose plugin, if it has one, is computed by plain PyTorch."""
    copy = copied(sam)
    for module in copy.modules():
        if isinstance(module, DeformableSampler):
            module.backend = "reference"
    return copy


@cache
def in_float64(sam: Sam) -> Sam:
    """`with_reference`, its mask decoder in double precision."""
    exact = with_reference(sam)
    exact.mask_decoder.double()
    return exact


def boxes(count: int, side: int) -> Tensor:
    """Random boxes (count, 4) in a frame of ``side`` pixels, each an eighth of it long at least."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) / 2
    size = 1 / 8 + torch.rand(count, 2, generator=generator) * 3 / 8
    return side * torch.cat([corner, corner + size], dim=1)


def embeddings(run: Run, count: int) -> Tensor:
    """Random ones of so many pictures, (count, C, h, w)."""
    side = image_size(run) // STRIDE
    return torch.randn(count, EMBED_DIM, side, side, generator=torch.Generator().manual_seed(0)).to(run.device)
