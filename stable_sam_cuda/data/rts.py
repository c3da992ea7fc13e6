"""RTS, the paper's robust training strategy: the prompts of each picture of a step are of one kind, drawn at random."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_sam_cuda.data.prompts import (
    PromptBatch,
    boxes_from_masks,
    boxes_in_iou_band,
    coarse_masks,
    noisy_boxes,
    points_in_masks,
)


@dataclass(frozen=True)
class PromptMix:
    """Relative frequencies of the prompt kinds. The paper names the first five, not their frequencies."""

    gt_box: float = 0.5
    noisy_box: float = 3.0
    one_point: float = 2.0
    three_points: float = 0.5
    ten_points: float = 0.5
    box_50_60: float = 0.0
    box_60_70: float = 0.0
    coarse_mask: float = 0.0

    def kinds(self) -> tuple[list[str], list[float]]:
        """The kinds that occur, and their frequencies."""
        occurring = {kind: frequency for kind, frequency in vars(self).items() if frequency}
        return list(occurring), list(occurring.values())

    @classmethod
    def parsed(cls, text: str) -> "PromptMix":
        """``"noisy_box=4,gt_box=1"``: kinds by commas; a kind that is not named does not occur.

        Raises:
            ValueError: ``text`` is something else, a kind is unknown or named twice, or no frequency is above 0.
        """
        expected = f"mix: expected KIND=FREQUENCY by commas, KIND of {', '.join(vars(cls()))}, got {text!r}"
        frequencies: dict[str, float] = dict.fromkeys(vars(cls()), 0.0)
        named = set()
        for part in text.split(","):
            kind, _, number = part.strip().partition("=")
            try:
                frequency = float(number)
            except ValueError:
                raise ValueError(expected) from None
            if kind not in frequencies or kind in named:
                raise ValueError(expected)
            if not (math.isfinite(frequency) and frequency >= 0):
                raise ValueError(f"mix: expected finite frequencies of at least 0, got {part.strip()}")
            frequencies[kind] = frequency
            named.add(kind)
        if not any(frequencies.values()):
            raise ValueError(f"mix: expected a frequency above 0, got {text!r}")
        return cls(**frequencies)


ROBUST = PromptMix()
GOOD_BOX_ONLY = PromptMix(gt_box=1, noisy_box=0, one_point=0, three_points=0, ten_points=0)
POINT_KINDS = {"one_point": 1, "three_points": 3, "five_points": 5, "ten_points": 10}
BAND_KINDS = {"box_50_60": (0.5, 0.6), "box_60_70": (0.6, 0.7)}  # IoU with the exact box
PROMPT_KINDS = ("gt_box", "noisy_box", *BAND_KINDS, *POINT_KINDS, "coarse_mask")


def draw_kind(mix: PromptMix, generator: torch.Generator) -> str:
    """One prompt kind, by the mix's frequencies."""
    kinds, frequencies = mix.kinds()
    return kinds[int(torch.multinomial(torch.tensor(frequencies, dtype=torch.float), 1, generator=generator))]


def joined_prompts(batches: list[PromptBatch]) -> PromptBatch:
    """Batches of one prompt kind as one, in their order."""
    fields: dict[str, Any] = {}
    for name in vars(batches[0]):
        values = [getattr(batch, name) for batch in batches]
        fields[name] = None if values[0] is None else torch.cat(values)
    return PromptBatch(**fields)


def draw_prompts(
    kind: str,
    masks: Tensor,
    image_index: Tensor,
    generator: torch.Generator,
    extent: tuple[int, int] | None = None,
    mask_size: tuple[int, int] = (256, 256),
) -> PromptBatch:
    """Prompts of one kind for masks (K, S, S) bool in SAM's input frame.

    Args:
        kind: one of `PROMPT_KINDS`.
        extent: height and width of the picture inside the frame, to which noisy boxes are clipped.
        mask_size: height and width of SAM's mask input, ``sam.prompt_encoder.mask_input_size``.

    Raises:
        ValueError: the kind is unknown, or a mask is empty.
    """
    height, width = extent or masks.shape[-2:]
    if kind == "gt_box":
        return PromptBatch(image_index, boxes=boxes_from_masks(masks))
    if kind == "noisy_box":
        return PromptBatch(image_index, boxes=noisy_boxes(boxes_from_masks(masks), height, width, generator))
    if kind in BAND_KINDS:
        boxes = boxes_in_iou_band(boxes_from_masks(masks), height, width, *BAND_KINDS[kind], generator)
        return PromptBatch(image_index, boxes=boxes)
    if kind == "coarse_mask":
        return PromptBatch(image_index, masks=coarse_masks(masks, mask_size, generator))
    if kind in POINT_KINDS:
        points = points_in_masks(masks, POINT_KINDS[kind], generator)
        return PromptBatch(image_index, points=points, labels=torch.ones(points.shape[:2]))
    raise ValueError(f"kind: expected one of {', '.join(PROMPT_KINDS)}, got {kind!r}")
