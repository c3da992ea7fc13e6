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


def whole_mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`mask_loss` over every pixel of logits (K, 1, h, w), for targets (K, 1, H, W) that may be finer: (K,)."""
    height, width = logits.shape[-2:]
    return mask_loss(logits, F.adaptive_avg_pool2d(targets, (height, width)))[:, 0]


def point_sampled_loss(
    logits: Tensor,
    targets: Tensor,
    generator: torch.Generator | None = None,
    points: int = 112 * 112,
    oversample: float = 3.0,
    importance: float = 0.75,
) -> Tensor:
    """HQ-SAM's training loss: cross-entropy plus dice at PointRend's points, logits (K, 1, h, w) -> (K,).

    ``oversample * points`` candidates are drawn; the ``importance`` part of the points are those candidates where
    the logits are least certain, the rest are drawn anew. ``targets`` (K, 1, H, W) may be finer than the logits.
    """
    count = len(logits)
    with torch.no_grad():
        candidates = torch.rand(count, int(points * oversample), 2, generator=generator).to(logits.device)
        certainty = _at_points(logits, candidates).abs()
        uncertain = certainty.topk(int(points * importance), dim=1, largest=False).indices
        chosen = candidates.gather(1, uncertain[..., None].expand(-1, -1, 2))
        fresh = torch.rand(count, points - chosen.shape[1], 2, generator=generator).to(logits.device)
        where = torch.cat([chosen, fresh], dim=1)
        wanted = _at_points(targets.float(), where)
    found = _at_points(logits, where)
    return mask_loss(found[:, None, None], wanted[:, None, None])[:, 0]


def _at_points(values: Tensor, where: Tensor) -> Tensor:
    """Bilinear values (K, P) of (K, 1, h, w) at points (K, P, 2) given as fractions x, y of the frame."""
    return F.grid_sample(values, where[:, :, None] * 2 - 1, align_corners=False)[:, 0, :, 0]
