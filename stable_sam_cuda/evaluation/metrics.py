"""Overlap, boundary overlap and stability of masks, in batches, on any device.

Masks are boolean tensors (..., H, W); leading axes broadcast. Two empty masks agree fully: their IoU is 1,
so that a correct "nothing here" is not a failure and no metric divides by zero.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BOUNDARY_DILATION = 0.02  # of the picture's diagonal (HQ-SAM's protocol)


def mask_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of boolean masks (..., H, W) -> float32 (...).

    Raises:
        TypeError: a mask is not boolean.
        ValueError: the masks differ in height or width.
    """
    _check_masks(predicted=predicted, target=target)
    if predicted.shape[-2:] != target.shape[-2:]:
        raise ValueError(
            f"target: expected masks of size {tuple(predicted.shape[-2:])}, got {tuple(target.shape[-2:])}"
        )
    intersection = (predicted & target).sum((-2, -1))
    union = (predicted | target).sum((-2, -1))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def mask_boundary(masks: Tensor, dilation: float = BOUNDARY_DILATION) -> Tensor:
    """The pixels of each mask within ``dilation`` diagonals of its outline: bool (..., H, W).

    The distance is d = max(1, round(dilation * diagonal)) steps of a 3x3 erosion; outside the picture is background.
    """
    _check_masks(masks=masks)
    height, width = masks.shape[-2:]
    distance = max(1, round(dilation * (height**2 + width**2) ** 0.5))
    return masks & ~_eroded(_eroded(masks, distance, -1), distance, -2)


def _eroded(masks: Tensor, distance: int, axis: int) -> Tensor:
    """True where all pixels up to ``distance`` before and behind are: d steps of a 3-wide erosion, in log(d) steps."""
    padding = [distance, distance] if axis == -1 else [0, 0, distance, distance]
    covered, span, window = F.pad(masks, padding), 1, 2 * distance + 1
    while span < window:
        step = min(span, window - span)
        length = covered.shape[axis] - step
        covered = covered.narrow(axis, 0, length) & covered.narrow(axis, step, length)
        span += step
    return covered


def boundary_iou(predicted: Tensor, target: Tensor, dilation: float = BOUNDARY_DILATION) -> Tensor:
    """IoU of the two masks' boundaries (Cheng et al., 2021): float32 (...)."""
    return mask_iou(mask_boundary(predicted, dilation), mask_boundary(target, dilation))


def stability(masks: Tensor) -> Tensor:
    """Segmentation stability ST = 1/B * sum_i IoU(M_i, union_j M_j) of B masks of one object.

    Args:
        masks: bool (..., B, H, W), the masks that B prompts of one kind gave.

    Returns:
        float32 (...), 1 where all masks are the same.

    Raises:
        TypeError: ``masks`` is not boolean.
        ValueError: there is no mask at all.
    """
    _check_masks(masks=masks)
    if masks.ndim < 3 or masks.shape[-3] == 0:
        raise ValueError(f"masks: expected at least one mask, shape (..., B, H, W), got shape {tuple(masks.shape)}")
    return mask_iou(masks, masks.any(-3, keepdim=True)).mean(-1)


def _check_masks(**masks: Tensor) -> None:
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected a boolean mask, got {mask.dtype}")
