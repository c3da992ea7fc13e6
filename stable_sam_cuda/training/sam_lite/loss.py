"""Loss of a training step, and the figures of a validation."""

import math

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.data.prompts import PromptBatch, boxes_from_masks, points_in_masks
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK
from stable_sam_cuda.training.decoding import decode_prompts
from stable_sam_cuda.training.losses import mask_loss, mask_overlap
from stable_sam_cuda.training.sam_lite.batches import Batch, draw_batch
from stable_sam_cuda.training.sam_lite.prompts import add_corrective_click, draw_good_prompts

REFINEMENT = 0.2  # how often a step is followed by one with the first answer's logits and a corrective click
VALIDATED_OBJECTS = 8


def prompt_loss(
    sam: Sam, embeddings: Tensor, prompts: PromptBatch, masks: Tensor, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the single-mask output, of the best of the three, and of the predicted IoU.

    ``half`` runs the decoder, not the loss, in bfloat16 under autocast.

    Returns the scalar loss, the single-mask IoU (K,) and the single-mask logits (K, 1, h, w), detached.
    """
    with torch.autocast(embeddings.device.type, torch.bfloat16, enabled=half):
        logits, predicted_iou = (answer.float() for answer in decode_prompts(sam, embeddings, prompts))
    factor = masks.shape[-1] // logits.shape[-1]
    targets = torch.nn.functional.avg_pool2d(masks[:, None].float(), factor)
    losses = mask_loss(logits, targets)
    overlap = mask_overlap(logits, targets)
    total = losses[:, 0] + losses[:, 1:].min(dim=1).values + (predicted_iou - overlap).square().sum(1)
    return total.mean(), overlap[:, 0], logits[:, :1].detach()


def training_step(sam: Sam, batch: Batch, generator: torch.Generator, half: bool = False) -> tuple[Tensor, Tensor]:
    """Loss of one batch on the model's device, and its mean single-mask IoU, both scalars."""
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=half):
        embeddings = sam.image_encoder(sam.preprocess(batch.images.float())).float()
    prompts = draw_good_prompts(batch, generator)
    loss, overlap, logits = prompt_loss(sam, embeddings, prompts, batch.masks, half)
    if torch.rand((), generator=generator).item() < REFINEMENT:
        add_corrective_click(prompts, batch.masks, logits, generator)
        loss = (loss + prompt_loss(sam, embeddings, prompts, batch.masks, half)[0]) / 2
    return loss, overlap.mean()


@torch.inference_mode()
def validate(sam: Sam, samples: list[Sample], size: int) -> dict[str, float]:
    """Mean over pictures of the mean IoU over their objects, in the input frame, by prompt kind."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    totals: dict[str, list[float]] = {"gt_box": [], "1_point": [], "3_points": []}
    for sample in samples:
        batch = draw_batch([sample], size, VALIDATED_OBJECTS, rng, augment=False).to(sam.device)
        if not len(batch.masks):
            continue
        embeddings = sam.image_encoder(sam.preprocess(batch.images.float()))
        kinds = {"gt_box": PromptBatch(batch.image_index, boxes=boxes_from_masks(batch.masks))}
        for count, name in ((1, "1_point"), (3, "3_points")):
            points = points_in_masks(batch.masks, count, generator)
            kinds[name] = PromptBatch(batch.image_index, points, points.new_ones(points.shape[:2]))
        for name, prompts in kinds.items():
            logits, _ = decode_prompts(sam, embeddings, prompts, SINGLE_MASK)
            logits = torch.nn.functional.interpolate(logits, size=(size, size), mode="bilinear")
            totals[name].append(mask_overlap(logits, batch.masks[:, None].float()).mean().item())
    return {name: float(np.mean(values)) if values else math.nan for name, values in totals.items()}
