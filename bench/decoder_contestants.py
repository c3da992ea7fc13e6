"""Contestants of the GPU decoder benchmark, on their own copies of the models."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from decoder_models import models, with_both_blocks
from decoder_prompts import Prompts, TrainingBatch
from sampler_providers import eager as eager_sampler
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import StableSamPredictor, plugin_of, stabilize, unstabilize
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK, THREE_MASKS, decode
from stable_sam_cuda.training.decoding import decode_prompts
from stable_sam_cuda.training.losses import whole_mask_loss

SAM, SHARED, OWN, BOTH = "sam", "sam, shared", "fused", "fused, both blocks"
EAGER, REFERENCE = "eager", "reference"
LOSS_SCALE = 2.0**16  # in float16, where gradients of a mean over pixels would vanish otherwise; GradScaler's first

Answer = tuple[Tensor, Tensor]


class EagerSampler(DeformableSampler):
    """The plugin as one writes it in PyTorch. Being a class of its own, it is never fused into the attention."""

    def forward(self, image_features: Tensor, output_token: Tensor) -> Tensor:
        network = self.offset_network
        projected = network.projection(image_features)
        hidden = F.gelu(network.norm(network.depthwise(projected).permute(0, 2, 3, 1)))
        offsets = network.pointwise(hidden.permute(0, 3, 1, 2))
        return eager_sampler(projected, offsets, image_features, self.router(output_token), self.max_offset)


@cache
def models_in(dtype: torch.dtype, device: torch.device, image_size: int) -> tuple[Sam, Sam]:
    """Plain and stabilised; the mask decoder converted, the prompt encoder in float32, where coordinates need it."""
    both = models(device, image_size)
    for sam in both:
        sam.mask_decoder.to(dtype)
    return both


@cache
def both_blocks_in(dtype: torch.dtype, device: torch.device, image_size: int) -> Sam:
    """The stabilised model with its plugin in both blocks."""
    return with_both_blocks(models_in(dtype, device, image_size)[1])


def in_float64(sam: Sam) -> Sam:
    """A copy that holds the truth: plain PyTorch in double precision, but for SAM's prompt encoder, which has none."""
    exact = deepcopy(sam).double()
    exact.prompt_encoder.float()
    if is_stable(exact):
        plugin_of(exact).backend = REFERENCE
    return exact


def is_stable(sam: Sam) -> bool:
    return any(isinstance(module, DeformableSampler) for module in sam.modules())


def by_sam(decoder: MaskDecoder, prompts: Prompts) -> Answer:
    """segment_anything's own forward; the three masks of an ambiguous prompt."""
    return decoder(*prompts, multimask_output=True)


def by_us(sam: Sam, prompts: Prompts) -> Answer:
    return decode(sam, prompts.image, prompts.sparse, prompts.dense, THREE_MASKS)


def decoders(plain: Sam, stable: Sam, both: Sam) -> dict[str, tuple[Sam, Callable[[Prompts], Answer]]]:
    """Provider -> the model that tells its truth, and its step."""
    return {
        OWN: (stable, partial(by_us, stable)),
        BOTH: (both, partial(by_us, both)),
        SAM: (plain, partial(by_sam, plain.mask_decoder)),
        SHARED: (plain, partial(by_us, plain)),
    }


def predictors(plain: Sam, stable: Sam) -> dict[str, SamPredictor]:
    return {OWN: StableSamPredictor(stable), SAM: SamPredictor(plain)}


def predict(predictor: SamPredictor, box: np.ndarray) -> np.ndarray:
    """Logits of low resolution (1, h, w)."""
    return predictor.predict(box=box, multimask_output=False)[2]


def set_image_and_predict(predictor: SamPredictor, picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    predictor.set_image(picture)
    return predict(predictor, box)


class TrainingStep:
    """Decoder forward, loss, backward to the plugin, one step of Adam; all contestants share this package's decoder.

    Half types by autocast, parameters in float32. float16 without GradScaler's look for infinities.
    """

    def __init__(self, provider: str, stable: Sam, dtype: torch.dtype) -> None:
        self.sam, self.dtype = deepcopy(stable), dtype
        plugin = plugin_of(self.sam)
        if provider == EAGER:
            eager = EagerSampler(**plugin.config())
            eager.load_state_dict(plugin.state_dict())
            stabilize(unstabilize(self.sam), eager)
        elif provider == REFERENCE:
            plugin.backend = REFERENCE
        self.parameters = list(plugin_of(self.sam).parameters())
        self.scale = LOSS_SCALE if dtype == torch.float16 else 1.0
        self.optimizer = torch.optim.Adam(self.parameters, lr=5e-4)

    def loss(self, batch: TrainingBatch) -> Tensor:
        half = self.dtype if self.dtype.itemsize == 2 else None
        with torch.autocast(self.sam.device.type, half, enabled=half is not None):
            logits, _ = decode_prompts(self.sam, batch.embeddings, batch.prompts, SINGLE_MASK)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return self.scale * whole_mask_loss(logits, batch.targets).mean()

    def gradients(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The loss, and the gradients of the plugin's two parts, each as one vector."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        plugin = plugin_of(self.sam)
        parts = {"grad_offset_network": plugin.offset_network, "grad_router": plugin.router}
        return {"loss": loss.detach() / self.scale} | {
            name: torch.cat([parameter.grad.flatten() for parameter in part.parameters()]) / self.scale
            for name, part in parts.items()
        }

    def __call__(self, batch: TrainingBatch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(batch).backward()
        self.optimizer.step()


def exact_gradients(stable: Sam, batch: TrainingBatch) -> dict[str, Tensor]:
    """The same in float64, by plain PyTorch."""
    return TrainingStep(REFERENCE, in_float64(stable), torch.float64).gradients(batch.to(torch.float64))
