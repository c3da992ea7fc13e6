"""The parts of a training step: the decoder's answers, the learning rate, the router's decisions, what is measured.

A step measures a row (1, loss, IoU, alpha_1) a picture, means over its objects; zeros where it has none.
"""

import math

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from stable_sam_cuda.data.prompts import PromptBatch
from stable_sam_cuda.modules.router import DynamicRouter
from stable_sam_cuda.sam.prompt_encoding import encode_prompts
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, decode

RATE_FLOOR = 0.02  # of the learning rate, at the end of a run


def decode_prompts(
    sam: Sam, embeddings: Tensor, prompts: PromptBatch, masks: tuple[int, ...] = ALL_MASKS
) -> tuple[Tensor, Tensor]:
    """Embeddings (I, C, h, w) and K prompts -> logits (K, M, 4h, 4w) of the M wanted masks, their predicted IoU (K, M).

    The prompts may belong to different pictures; SAM's own forward takes one.
    Mask 0 is SAM's single-mask output, 1 to 3 its answers to an ambiguous prompt.
    """
    encoder = sam.prompt_encoder
    sparse, dense = encode_prompts(encoder, prompts.points, prompts.labels, prompts.boxes, prompts.masks)
    if len(embeddings) > 1:
        embeddings = embeddings[prompts.image_index]
    return decode(sam, embeddings, sparse, dense, masks)


def cosine(progress: float) -> float:
    """Factor of the learning rate at a part of the run in [0, 1]: from 1 down to `RATE_FLOOR` along a cosine."""
    return RATE_FLOOR + (1 - RATE_FLOOR) * (1 + math.cos(math.pi * min(1, progress))) / 2


class RouterProbe:
    """alpha_1, the weight of the deformed features, of the last forward of a SAM's router, if it has one.

    It listens as long as it is used as a context.
    """

    def __init__(self, sam: Sam) -> None:
        self.last: Tensor | None = None
        self.routers = [module for module in sam.modules() if isinstance(module, DynamicRouter)]

    def __enter__(self) -> "RouterProbe":
        self.hooks = [router.register_forward_hook(self._hear) for router in self.routers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hear(self, router: nn.Module, inputs: tuple[Tensor, ...], alpha: Tensor) -> None:
        self.last = alpha.detach()[:, 0].float()

    def alpha(self, prompts: int, device: torch.device) -> Tensor:
        """alpha_1 (prompts,) of the last forward; zeros without a router."""
        return torch.zeros(prompts, device=device) if self.last is None else self.last


def sum_of(rows: Tensor) -> Tensor:
    """Rows added one after the other, so that the sum has the same bits wherever they came from."""
    totals = torch.zeros_like(rows[0])
    for row in rows:
        totals += row
    return totals


def alpha_by_kind(rows: Tensor, kinds: list[str]) -> dict[str, float]:
    """alpha_1 by prompt kind, the mean over its pictures; kinds without an object have none."""
    found = {}
    for kind in dict.fromkeys(kinds):
        pictures, _, _, alpha = sum_of(rows[[index for index, own in enumerate(kinds) if own == kind]]).tolist()
        if pictures:
            found[kind] = alpha / pictures
    return found
