"""Prompts and loss of a training step, and the figures of a validation.

``sam_lite`` learns from good prompts, as SAM itself was trained with.
"""

import math

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.data.prompts import PromptBatch, boxes_from_masks, jittered_boxes, points_in_masks
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK
from stable_sam_cuda.training.losses import mask_loss, mask_overlap
from stable_sam_cuda.training.sam_lite.batches import Batch, draw_batch
from stable_sam_cuda.training.step import decode_prompts

POINT_COUNTS = (1, 1, 1, 2, 3, 5, 10)
NEGATIVE_POINTS = 0.2  # how often points outside the object are added
REFINEMENT = 0.2  # how often a step is followed by one with the first answer's logits and a corrective click
VALIDATED_OBJECTS = 8


def draw_good_prompts(batch: Batch, generator: torch.Generator) -> PromptBatch:
    """A jittered box, or 1 to 10 points, for each object; one kind a step, so that shapes agree."""
    size = batch.masks.shape[-1]
    prompts = PromptBatch(batch.image_index)
    kind = torch.rand((), generator=generator).item()
    if kind < 0.5:
        prompts.boxes = jittered_boxes(boxes_from_masks(batch.masks), size, size, generator)
    if kind > 0.4:
        count = POINT_COUNTS[int(torch.randint(len(POINT_COUNTS), (), generator=generator))]
        prompts.points = points_in_masks(batch.masks, count, generator)
        prompts.labels = prompts.points.new_ones(prompts.points.shape[:2])
        if torch.rand((), generator=generator).item() < NEGATIVE_POINTS:
            points = points_in_masks(_surroundings(batch.masks), 1, generator)
            _add_points(prompts, points, points.new_zeros(len(points)))
    return prompts


def _surroundings(masks: Tensor) -> Tensor:
    """Background pixels; all pixels for an object that fills the frame."""
    outside = ~masks
    outside[~outside.flatten(1).any(1)] = True
    return outside


def _add_points(prompts: PromptBatch, points: Tensor, labels: Tensor) -> None:
    """Add points (K, P, 2), all of an object with one label of ``labels`` (K,)."""
    labels = labels[:, None].expand(points.shape[:2])
    prompts.points = torch.cat([prompts.points, points], 1) if prompts.points is not None else points
    prompts.labels = torch.cat([prompts.labels, labels], 1) if prompts.labels is not None else labels


def add_corrective_click(prompts: PromptBatch, masks: Tensor, logits: Tensor, generator: torch.Generator) -> None:
    """SAM's iterative training: the last answer's logits (K, 1, h, w) and one click in its error region."""
    prompts.masks = logits
    scale = masks.shape[-1] // logits.shape[-1]
    answer = (logits[:, 0] > 0).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    error = answer ^ masks
    error[~error.flatten(1).any(1)] = True
    click = points_in_masks(error, 1, generator)
    x, y = click[:, 0].long().unbind(1)
    objects = torch.arange(len(masks), device=masks.device)
    _add_points(prompts, click, masks[objects, y, x].float())


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
