"""Prompts tested as what they are: distributions."""

import pytest
import torch

from stable_sam_cuda.training.prompts import boxes_from_masks, jittered_boxes, noisy_boxes, points_in_masks
from stable_sam_cuda.training.rts import GOOD_BOX_ONLY, ROBUST, draw_kind, draw_prompts

SIZE = (60, 80)


def rectangle(y0, y1, x0, x1):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_box_is_tight_also_for_one_pixel_and_the_whole_picture():
    masks = torch.stack([rectangle(10, 20, 30, 50), rectangle(5, 5, 7, 7), rectangle(0, 59, 0, 79)])
    assert boxes_from_masks(masks).tolist() == [[30, 10, 50, 20], [7, 5, 7, 5], [0, 0, 79, 59]]


def test_box_of_an_empty_mask_is_refused_by_its_index():
    with pytest.raises(ValueError, match=r"empty masks at \[1\]"):
        boxes_from_masks(torch.stack([rectangle(1, 2, 3, 4), rectangle(9, 3, 1, 0)]))


def test_noisy_box_is_uniform_with_scale_on_centre_and_sides(generator):
    box = torch.tensor([[200.0, 300.0, 240.0, 380.0]]).expand(20000, 4)
    noisy = noisy_boxes(box, 1000, 1000, generator, scale=0.4)
    size, centre = noisy[:, 2:] - noisy[:, :2], (noisy[:, 2:] + noisy[:, :2]) / 2
    for axis, (side, middle) in enumerate(((40, 220), (80, 340))):
        growth = size[:, axis] / side - 1
        shift = (centre[:, axis] - middle) / side
        for values, bound in ((growth, 0.4), (shift, 0.2)):
            assert values.abs().max() <= bound + 1e-5
            assert values.abs().max() > 0.99 * bound
            assert values.mean().abs() < 0.02 * bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_noisy_box_stays_inside_the_picture_and_never_degenerates(generator):
    edge = torch.tensor([[0.0, 0.0, 79.0, 59.0], [79.0, 59.0, 79.0, 59.0], [0.0, 0.0, 0.0, 0.0]])
    for _ in range(200):
        boxes = noisy_boxes(edge, *SIZE, generator, scale=0.8)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([79.0, 59.0])).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()


def test_jitter_is_normal_with_a_tenth_of_the_side_and_bounded(generator):
    box = torch.tensor([[400.0, 400.0, 500.0, 900.0]]).expand(20000, 4)
    shift = jittered_boxes(box, 1024, 1024, generator) - box
    assert shift[:, 0].std() == pytest.approx(9.3, rel=0.05)  # normal of 10, clipped at 20
    assert shift.abs().max() == pytest.approx(20, abs=1e-4)
    assert (shift[:, 1].abs() > 19.999).float().mean() > 0.5  # of a long side most would go further


def test_points_are_uniform_over_the_object(generator):
    mask = rectangle(10, 13, 20, 24)
    points = points_in_masks(mask[None], 20000, generator)[0].long()
    assert mask[points[:, 1], points[:, 0]].all()
    counts = torch.bincount((points[:, 1] - 10) * 5 + points[:, 0] - 20, minlength=20).float()
    assert counts.min() > 850
    assert counts.max() < 1150


def test_kinds_follow_the_mix(generator):
    drawn = [draw_kind(ROBUST, generator) for _ in range(5000)]
    names, frequencies = ROBUST.kinds()
    for name, frequency in zip(names, frequencies, strict=True):
        assert drawn.count(name) / 5000 == pytest.approx(frequency / sum(frequencies), abs=0.03)
    assert {draw_kind(GOOD_BOX_ONLY, generator) for _ in range(100)} == {"gt_box"}


@pytest.mark.parametrize(
    ("kind", "points"), [("gt_box", 0), ("noisy_box", 0), ("one_point", 1), ("three_points", 3), ("ten_points", 10)]
)
def test_prompts_of_a_kind_are_all_of_one_shape(kind, points, generator):
    masks = torch.stack([rectangle(10, 20, 30, 50), rectangle(5, 5, 7, 7)])
    prompts = draw_prompts(kind, masks, torch.tensor([0, 3]), generator)
    if points:
        assert prompts.boxes is None
        assert prompts.points.shape == (2, points, 2)
        assert prompts.labels.tolist() == [[1.0] * points] * 2
    else:
        assert prompts.points is None
        assert prompts.boxes.shape == (2, 4)


def test_unknown_kind_is_named(generator):
    with pytest.raises(ValueError, match="kind: expected gt_box"):
        draw_prompts("scribble", rectangle(1, 2, 3, 4)[None], torch.tensor([0]), generator)
