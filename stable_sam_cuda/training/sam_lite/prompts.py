"""The prompts that ``sam_lite`` learns from: good ones, as SAM itself was trained with."""

import torch
from torch import Tensor

from stable_sam_cuda.data.prompts import PromptBatch, boxes_from_masks, jittered_boxes, points_in_masks
from stable_sam_cuda.training.sam_lite.batches import Batch

POINT_COUNTS = (1, 1, 1, 2, 3, 5, 10)
NEGATIVE_POINTS = 0.2  # how often points outside the object are added


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
