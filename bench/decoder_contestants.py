"""Models, inputs and contestants of what is measured on whole models.

All are `sam_lite`, whose prompt encoder and mask decoder are SAM's own, with random embeddings and boxes.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cases import Run
from contestants import sample_eagerly
from segment_anything.modeling import Sam
from timing import relative_error
from torch import Tensor

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import load_sam, plugin_of, stabilize, unstabilize
from stable_sam_cuda.sam.lite import EMBED_DIM, IMAGE_SIZE, STRIDE, set_image_size
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK, THREE_MASKS, decode
from stable_sam_cuda.training.decoding import PromptBatch, decode_prompts
from stable_sam_cuda.training.losses import whole_mask_loss

TOKENS = 7  # of a box
QUICK_IMAGE = 64  # pixels: an embedding of 8 x 8
LOSS_SCALE = 2.0**16  # in float16, where gradients of a mean over pixels would vanish otherwise; GradScaler's first


class SampledPlugin(DeformableSampler):
    """The same plugin, never fused into the attention, because it is of another class."""


class EagerPlugin(DeformableSampler):
    """The plugin as one writes it in PyTorch."""

    def forward(self, image_features: Tensor, output_token: Tensor) -> Tensor:
        network = self.offset_network
        projected = network.projection(image_features)
        hidden = F.gelu(network.norm(network.depthwise(projected).permute(0, 2, 3, 1)))
        inputs = {"features": projected, "offsets": network.pointwise(hidden.permute(0, 3, 1, 2))}
        shares = {"identity": image_features, "alpha": self.router(output_token), "max_offset": self.max_offset}
        return sample_eagerly(inputs | shares)


@cache
def plain_sam(run: Run, dtype: torch.dtype) -> Sam:
    """The mask decoder converted, the prompt encoder in float32, where coordinates need it."""
    sam = load_sam("sam_lite", device="cpu").requires_grad_(False)
    set_image_size(sam, QUICK_IMAGE if run.quick else IMAGE_SIZE)
    sam.mask_decoder.to(dtype)
    return sam.to(run.device)


@cache
def stable_sam(
    run: Run, dtype: torch.dtype, plugin: type[DeformableSampler] = DeformableSampler, blocks: int = 1
) -> Sam:
    """With a plugin no weight of which is at its initial value: the same weights whatever the class and the blocks."""
    sam = stabilize(copied(plain_sam(run, torch.float32)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in plugin_of(sam).parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter))
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


def facts(run: Run) -> dict[str, object]:
    side = (QUICK_IMAGE if run.quick else IMAGE_SIZE) // STRIDE
    return {"T": TOKENS, "C": EMBED_DIM, "H": side, "W": side, "max_offset": DeformableSampler().max_offset}


def boxes(count: int, side: int, device: torch.device) -> Tensor:
    """Random boxes (count, 4) in a frame of ``side`` pixels, each an eighth of it long at least."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) / 2
    size = 1 / 8 + torch.rand(count, 2, generator=generator) * 3 / 8
    return (side * torch.cat([corner, corner + size], dim=1)).to(device)


def normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


class Prompts(NamedTuple):
    """So many boxes on one picture, as the decoder takes them."""

    image: Tensor  # (1, C, h, w)
    image_pe: Tensor  # (1, C, h, w)
    sparse: Tensor  # (B, 2, C)
    dense: Tensor  # (B, C, h, w), one embedding repeated without memory, as SAM's prompt encoder gives it


@torch.no_grad()
def make_prompts(run: Run, dtype: torch.dtype, count: int) -> Prompts:
    encoder = plain_sam(run, dtype).prompt_encoder
    side = encoder.input_image_size[0]
    sparse, dense = encoder(points=None, boxes=boxes(count, side, run.device), masks=None)
    image_pe = encoder.get_dense_pe()
    image = normal(tuple(image_pe.shape), run.device)
    return Prompts(image.to(dtype), image_pe.to(dtype), sparse.to(dtype), dense[:1].to(dtype).expand(dense.shape))


def decoded_by_sam(decoder: Callable[..., tuple[Tensor, Tensor]], prompts: Prompts) -> tuple[Tensor, Tensor]:
    """segment_anything's own forward, or torch.compile's of it: the three masks of an ambiguous prompt."""
    return decoder(*prompts, multimask_output=True)


def decoded_by_us(sam: Sam, prompts: Prompts) -> tuple[Tensor, Tensor]:
    return decode(sam, prompts.image, prompts.sparse, prompts.dense, THREE_MASKS)


def make_picture(side: int) -> np.ndarray:
    """(3/4 side, side, 3) of uint8: noise, which resizing blurs."""
    return np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)


class TrainingBatch(NamedTuple):
    """Cached embeddings of some pictures, and as many objects of each."""

    embeddings: Tensor  # (I, C, h, w)
    prompts: PromptBatch  # of K objects
    targets: Tensor  # (K, 1, side, side), 0 or 1, in the input frame


def make_training_batch(sam: Sam, pictures: int, objects: int) -> TrainingBatch:
    side, count = sam.image_encoder.img_size, pictures * objects
    corners = boxes(count, side, sam.device)
    pixels = torch.arange(side, device=sam.device)
    x0, y0, x1, y1 = corners[:, :, None].unbind(1)
    inside = ((pixels >= x0) & (pixels < x1))[:, None, :] & ((pixels >= y0) & (pixels < y1))[:, :, None]
    embedding = (sam.mask_decoder.transformer_dim, *sam.prompt_encoder.image_embedding_size)
    index = torch.arange(pictures, device=sam.device).repeat_interleave(objects)
    prompts = PromptBatch(index, boxes=corners)
    return TrainingBatch(normal((pictures, *embedding), sam.device), prompts, inside[:, None].float())


class TrainingStep:
    """Decoder forward, loss, backward to the plugin, one step of Adam; all contestants share this package's decoder.

    Half types by autocast, parameters in float32. float16 without GradScaler's look for infinities.
    """

    def __init__(self, sam: Sam, batch: TrainingBatch, dtype: torch.dtype) -> None:
        self.sam, self.batch, self.dtype = sam, batch, dtype
        self.plugin = plugin_of(sam)
        self.scale = LOSS_SCALE if dtype == torch.float16 else 1.0
        self.optimizer = torch.optim.Adam(self.plugin.parameters(), lr=5e-4)

    def backward(self) -> Tensor:
        """The loss, scaled."""
        self.optimizer.zero_grad(set_to_none=True)
        half = self.dtype if self.dtype.itemsize == 2 else None
        with torch.autocast(self.sam.device.type, half, enabled=half is not None):
            logits, _ = decode_prompts(self.sam, self.batch.embeddings, self.batch.prompts, SINGLE_MASK)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = self.scale * whole_mask_loss(logits, self.batch.targets).mean()
        loss.backward()
        return loss.detach()

    def results(self) -> dict[str, Tensor]:
        """The loss, and the gradients of the plugin's two parts, each as one vector."""
        loss, parts = self.backward(), {"offset_network": self.plugin.offset_network, "router": self.plugin.router}
        gradients = {n: torch.cat([p.grad.flatten() for p in part.parameters()]) for n, part in parts.items()}
        return {name: tensor / self.scale for name, tensor in ({"loss": loss} | gradients).items()}

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


def errors_of(found: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(found[name], truth) for name, truth in truths.items()}
