"""RTS, the paper's robust training strategy: every step's prompts are of one kind, drawn at random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stable_sam_cuda.training.decoding import PromptBatch
from stable_sam_cuda.training.prompts import boxes_from_masks, noisy_boxes, points_in_masks


@dataclass(frozen=True)
class PromptMix:
    """Relative frequencies of the prompt kinds. The paper names the kinds, not their frequencies."""

    gt_box: float = 1.0
    noisy_box: float = 2.0
    one_point: float = 1.0
    three_points: float = 0.5
    ten_points: float = 0.5

    def kinds(self) -> tuple[list[str], list[float]]:
        return list(self.__dict__), list(self.__dict__.values())


ROBUST = PromptMix()
GOOD_BOX_ONLY = PromptMix(gt_box=1, noisy_box=0, one_point=0, three_points=0, ten_points=0)
POINT_KINDS = {"one_point": 1, "three_points": 3, "five_points": 5, "ten_points": 10}


def draw_kind(mix: PromptMix, generator: torch.Generator) -> str:
    """One prompt kind, by the mix's frequencies."""
    kinds, frequencies = mix.kinds()
    return kinds[int(torch.multinomial(torch.tensor(frequencies), 1, generator=generator))]


def draw_prompts(
    kind: str, masks: Tensor, image_index: Tensor, generator: torch.Generator, extent: tuple[int, int] | None = None
) -> PromptBatch:
    """Prompts of one kind for masks (K, S, S) bool in SAM's input frame.

    Args:
        kind: ``gt_box``, ``noisy_box``, ``one_point``, ``three_points``, ``five_points`` or ``ten_points``.
        extent: height and width of the picture inside the frame, to which noisy boxes are clipped.

    Raises:
        ValueError: the kind is unknown, or a mask is empty.
    """
    height, width = extent or masks.shape[-2:]
    if kind == "gt_box":
        return PromptBatch(image_index, boxes=boxes_from_masks(masks))
    if kind == "noisy_box":
        return PromptBatch(image_index, boxes=noisy_boxes(boxes_from_masks(masks), height, width, generator))
    if kind in POINT_KINDS:
        points = points_in_masks(masks, POINT_KINDS[kind], generator)
        return PromptBatch(image_index, points=points, labels=torch.ones(points.shape[:2]))
    raise ValueError(f"kind: expected gt_box, noisy_box or one of {sorted(POINT_KINDS)}, got {kind!r}")
