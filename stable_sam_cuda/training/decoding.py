"""SAM's decoder over a batch of prompts that belong to different pictures (its own forward takes one)."""

from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor


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
        moved = {name: value if value is None else value.to(device) for name, value in vars(self).items()}
        return PromptBatch(**moved)


def decode_prompts(sam: Sam, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    """Embeddings (I, C, h, w) and K prompts -> mask logits (K, 4, 4h, 4w), predicted IoU (K, 4).

    Mask 0 is SAM's single-mask output, 1 to 3 its answers to an ambiguous prompt.
    """
    points = None if prompts.points is None else (prompts.points, prompts.labels)
    sparse, dense = sam.prompt_encoder(points=points, boxes=prompts.boxes, masks=prompts.masks)
    decoder = sam.mask_decoder
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)
    image = embeddings[prompts.image_index] + dense
    position = sam.prompt_encoder.get_dense_pe().expand(len(sparse), -1, -1, -1)

    tokens, image_tokens = decoder.transformer(image, position, tokens)
    upscaled = decoder.output_upscaling(image_tokens.transpose(1, 2).reshape(image.shape))
    mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
    weights = [mlp(mask_tokens[:, index]) for index, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = torch.einsum("kmc,kchw->kmhw", torch.stack(weights, dim=1), upscaled)
    return logits, decoder.iou_prediction_head(tokens[:, 0])
