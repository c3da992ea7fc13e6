"""Losses and overlaps of mask logits (K, M, h, w) with targets (K, 1, h, w) in [0, 1]."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy plus dice, weight 1 each (HQ-SAM's): (K, M)."""
    targets = targets.expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((-2, -1))
    probability = logits.sigmoid()
    overlap = (probability * targets).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + targets.sum((-2, -1)) + 1)
    return cross_entropy + dice


@torch.no_grad()
def mask_overlap(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of ``logits > 0`` with ``targets > 0.5``: (K, M); two empty masks agree fully."""
    predicted, wanted = logits > 0, targets > 0.5
    intersection = (predicted & wanted).sum((-2, -1)).float()
    union = (predicted | wanted).sum((-2, -1)).float()
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
