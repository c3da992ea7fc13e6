"""Losses against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from stable_sam_cuda.training.losses import mask_loss, mask_overlap, point_sampled_loss, whole_mask_loss


def test_mask_loss_is_cross_entropy_plus_dice():
    logits, targets = torch.randn(3, 2, 8, 8), (torch.rand(3, 1, 8, 8) > 0.5).float()
    probability = logits.sigmoid()
    for k in range(3):
        for m in range(2):
            entropy = F.binary_cross_entropy(probability[k, m], targets[k, 0])
            dice = 1 - (2 * (probability[k, m] * targets[k, 0]).sum() + 1) / (
                probability[k, m].sum() + targets[k, 0].sum() + 1
            )
            assert mask_loss(logits, targets)[k, m].item() == pytest.approx((entropy + dice).item(), rel=1e-5)


def test_whole_mask_loss_averages_finer_targets():
    logits, fine = torch.randn(3, 1, 8, 8), (torch.rand(3, 1, 32, 32) > 0.5).float()
    expected = mask_loss(logits, F.avg_pool2d(fine, 4))[:, 0]
    torch.testing.assert_close(whole_mask_loss(logits, fine), expected)


def test_overlap_of_perfect_empty_and_wrong_masks():
    target = torch.zeros(3, 1, 4, 4)
    target[0, 0, :2] = 1
    logits = target * 2 - 1
    logits[2] = 1
    assert mask_overlap(logits, target).flatten().tolist() == [1, 1, 0]


def test_point_loss_of_a_sure_and_right_mask_is_near_zero_and_of_a_wrong_one_large():
    target = torch.zeros(2, 1, 64, 64)
    target[:, :, 16:48, 16:48] = 1
    coarse = F.avg_pool2d(target, 2) * 40 - 20
    generator = torch.Generator().manual_seed(0)
    right = point_sampled_loss(coarse, target, generator)
    wrong = point_sampled_loss(-coarse, target, generator)
    assert (right < 0.3).all()
    assert (wrong > 5).all()


def test_point_loss_prefers_uncertain_points():
    """Where only a thin band is uncertain and wrong, three quarters of the points look there."""
    target = torch.zeros(1, 1, 64, 64)
    logits = torch.full((1, 1, 64, 64), -20.0)
    logits[..., 30:34] = 2.0
    focused = point_sampled_loss(logits, target, torch.Generator().manual_seed(0), points=1024)
    everywhere = mask_loss(logits, target)
    assert focused.item() > everywhere[0, 0].item()
    assert focused.item() > 0.9


def test_point_loss_has_gradients():
    logits = torch.randn(2, 1, 16, 16, requires_grad=True)
    point_sampled_loss(logits, (torch.rand(2, 1, 32, 32) > 0.5).float(), points=64).sum().backward()
    assert logits.grad.abs().sum() > 0
