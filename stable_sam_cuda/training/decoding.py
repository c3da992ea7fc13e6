"""SAM's decoder over a batch of prompts that belong to different pictures (its own forward takes one)."""

from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.sam.prompt_encoding import encode_prompts
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, decode


@dataclass
class PromptBatch:
    """K prompts of one kind, in pixels of SAM's input frame.

    image_index (K,): which embedding each prompt belongs to. points (K, P, 2) with labels (K, P), 1 object,
    0 background; boxes (K, 4); masks (K, 1, 4h, 4w) logits. Any of the last three kinds may be None.
    """

    image_index: Tensor
    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def to(self, device: torch.device) -> "PromptBatch":
        """The same prompts on another device."""
        optional = (self.points, self.labels, self.boxes, self.masks)
        moved = (value if value is None else value.to(device) for value in optional)
        return PromptBatch(self.image_index.to(device), *moved)


def decode_prompts(
    sam: Sam, embeddings: Tensor, prompts: PromptBatch, masks: tuple[int, ...] = ALL_MASKS
) -> tuple[Tensor, Tensor]:
    """Embeddings (I, C, h, w) and K prompts -> logits (K, M, 4h, 4w) of the M wanted masks, their predicted IoU (K, M).

    Mask 0 is SAM's single-mask output, 1 to 3 its answers to an ambiguous prompt.
    """
    encoder = sam.prompt_encoder
    sparse, dense = encode_prompts(encoder, prompts.points, prompts.labels, prompts.boxes, prompts.masks)
    if len(embeddings) > 1:
        embeddings = embeddings[prompts.image_index]
    return decode(sam, embeddings, sparse, dense, masks)
