"""Metrics against OpenCV's erosion, plain set arithmetic, and hand-made cases."""

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as pycoco_mask

from stable_sam_cuda.evaluation.metrics import boundary_iou, mask_boundary, mask_iou, stability


def random_masks(count, height, width, seed):
    """Blobs, specks, full and empty masks."""
    rng = np.random.default_rng(seed)
    noise = rng.random((count, height, width)).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(layer, (0, 0), rng.uniform(0.3, 4)) for layer in noise])
    masks = np.stack([layer > np.quantile(layer, part) for layer, part in zip(smooth, rng.random(count), strict=True)])
    masks[0], masks[-1] = False, True
    return torch.from_numpy(masks)


def opencv_boundary(mask, distance):
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    return mask & (eroded == 0)


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (100, 20)], ids=str)
def test_boundary_equals_opencv_erosion_on_10000_masks_in_all(size):
    masks = random_masks(3334, *size, seed=sum(size))
    distance = max(1, round(0.02 * (size[0] ** 2 + size[1] ** 2) ** 0.5))
    expected = np.stack([opencv_boundary(mask, distance) for mask in masks.numpy()])
    assert torch.equal(mask_boundary(masks), torch.from_numpy(expected))


def test_boundary_of_a_wide_dilation_equals_opencv():
    masks = random_masks(50, 60, 80, seed=3)
    expected = np.stack([opencv_boundary(mask, 10) for mask in masks.numpy()])
    assert torch.equal(mask_boundary(masks, dilation=0.1), torch.from_numpy(expected))


def test_iou_equals_set_arithmetic():
    a, b = random_masks(300, 20, 30, seed=0), random_masks(300, 20, 30, seed=1)
    for one, other, value in zip(a, b, mask_iou(a, b), strict=True):
        first, second = (
            set(one.flatten().nonzero().flatten().tolist()),
            set(other.flatten().nonzero().flatten().tolist()),
        )
        union = first | second
        assert value.item() == pytest.approx(len(first & second) / len(union) if union else 1.0, abs=1e-6)


def test_iou_equals_pycocotools_on_10000_masks():
    predicted, target = (random_masks(10_000, 24, 31, seed=seed) for seed in (2, 3))

    def runs(masks):
        return pycoco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))

    pairs = zip(runs(predicted), runs(target), strict=True)
    expected = torch.tensor([pycoco_mask.iou([one], [other], [0])[0, 0] for one, other in pairs])
    both_empty = ~(predicted | target).any((1, 2))  # 0 / 0 is 0 there, and 1 here
    expected[both_empty] = 1
    torch.testing.assert_close(mask_iou(predicted, target), expected.float())


@pytest.mark.parametrize(
    ("predicted", "target", "expected"),
    [(False, False, 1.0), (True, False, 0.0), (False, True, 0.0), (True, True, 1.0)],
    ids=["both-empty", "target-empty", "prediction-empty", "both-full"],
)
def test_iou_of_empty_and_full_masks(predicted, target, expected):
    size = (4, 9, 7)
    for metric in (mask_iou, boundary_iou):
        assert metric(torch.full(size, predicted), torch.full(size, target)).tolist() == [expected] * 4


def test_stability_of_equal_disjoint_and_nested_masks():
    half = torch.zeros(4, 4, dtype=torch.bool)
    half[:2] = True
    assert stability(half.expand(5, 4, 4)).item() == 1
    assert stability(torch.stack([half, ~half])).item() == 0.5
    assert stability(torch.stack([half, torch.ones_like(half)])).item() == 0.75
    assert stability(torch.zeros(3, 4, 4, dtype=torch.bool)).item() == 1


def test_stability_is_batched():
    masks = random_masks(12, 15, 17, seed=5).view(3, 4, 15, 17)
    assert torch.equal(stability(masks), torch.stack([stability(group) for group in masks]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mask_iou(torch.ones(3, 3), torch.ones(3, 3) > 0), TypeError, "predicted: expected a boolean mask"),
        (lambda: mask_iou(torch.ones(3, 3) > 0, torch.ones(3, 4) > 0), ValueError, "target: expected masks of size"),
        (lambda: stability(torch.zeros(0, 3, 3) > 0), ValueError, "masks: expected at least one mask"),
    ],
    ids=["float-mask", "other-size", "no-mask"],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
