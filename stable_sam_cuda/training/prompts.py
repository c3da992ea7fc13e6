"""Prompts drawn from object masks: exact, jittered and noisy boxes, points inside and outside.

All functions are vectorised over K objects, take masks (K, H, W) bool and boxes (K, 4) as
x0, y0, x1, y1 in pixel indices (both ends inside the object), and draw from the ``generator`` given.
"""

import torch
from torch import Tensor

JITTER_STD = 0.1  # SAM: standard deviation of the jitter, as a fraction of the box side ...
JITTER_MAX = 20 / 1024  # ... and its bound, as a fraction of the input size
NOISE_SCALE = 0.4  # Stable-SAM's and HQ-SAM's noisy box


def boxes_from_masks(masks: Tensor) -> Tensor:
    """Tight boxes (K, 4) float32 of masks (K, H, W).

    Raises:
        ValueError: a mask is empty, so that it has no box.
    """
    rows, columns = masks.any(2), masks.any(1)
    if not bool(rows.any(1).all()):
        empty = (~rows.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"masks: expected at least one pixel in each mask, got empty masks at {empty}")

    def extent(line: Tensor) -> tuple[Tensor, Tensor]:
        first = line.int().argmax(1)
        last = line.shape[1] - 1 - line.flip(1).int().argmax(1)
        return first, last

    (x0, x1), (y0, y1) = extent(columns), extent(rows)
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def jittered_boxes(boxes: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """SAM's own training jitter: normal noise of 10 % of the side, at most 20 px of 1024."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    limit = JITTER_MAX * max(height, width)
    noise = (torch.randn(boxes.shape, generator=generator) * JITTER_STD * sides).clamp(-limit, limit)
    return _clipped(boxes + noise, height, width)


def noisy_boxes(
    boxes: Tensor, height: int, width: int, generator: torch.Generator, scale: float = NOISE_SCALE
) -> Tensor:
    """HQ-SAM's sloppy boxes: the centre moves by up to ``scale / 2`` of a side, the sides change by up to ``scale``."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    noise = torch.rand(boxes.shape, generator=generator) * 2 - 1
    centre = centre + noise[:, :2] * scale * size / 2
    half = size * (1 + noise[:, 2:] * scale) / 2
    return _clipped(torch.cat([centre - half, centre + half], dim=1), height, width)


def _clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes inside the picture, each side at least one pixel long."""
    low, high = boxes.minimum(boxes.roll(2, 1))[:, :2], boxes.maximum(boxes.roll(2, 1))[:, 2:]
    limit = boxes.new_tensor([width - 1, height - 1])
    low = low.clamp(min=0).minimum((limit - 1).clamp(min=0))
    high = high.minimum(limit).maximum((low + 1).minimum(limit))
    return torch.cat([low, high], dim=1)


def points_in_masks(masks: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` pixels drawn uniformly, with replacement, from each mask: (K, count, 2) as x, y.

    Raises:
        ValueError: a mask is empty.
    """
    flat = masks.flatten(1)
    sums = flat.cumsum(1)
    totals = sums[:, -1:]
    if bool((totals == 0).any()):
        raise ValueError("masks: expected at least one pixel in each mask, got an empty mask")
    ranks = (torch.rand(len(masks), count, generator=generator) * totals).floor().long() + 1
    index = torch.searchsorted(sums, ranks)
    width = masks.shape[2]
    return torch.stack([index % width, index // width], dim=2).float()
