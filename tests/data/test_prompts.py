"""Prompts tested as what they are: distributions."""

import pytest
import torch

from stable_sam_cuda.data.prompts import (
    GOOD_BOX_ONLY,
    PROMPT_KINDS,
    ROBUST,
    PromptMix,
    box_iou,
    boxes_from_masks,
    boxes_in_iou_band,
    coarse_masks,
    draw_kind,
    draw_prompts,
    jittered_boxes,
    noisy_boxes,
    points_in_masks,
)

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


def iou_by_pixels(one, other):
    """IoU of two boxes of whole coordinates, counted."""
    pixels = [
        {(x, y) for x in range(int(x0), int(x1)) for y in range(int(y0), int(y1))}
        for x0, y0, x1, y1 in (one.tolist(), other.tolist())
    ]
    return len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])


def test_box_iou_equals_counted_pixels(generator):
    corners = torch.randint(0, 15, (200, 2, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(1, 15, (200, 2, 2), generator=generator)], 2).float()
    for (one, other), overlap in zip(boxes, box_iou(boxes[:, 0], boxes[:, 1]), strict=True):
        assert overlap.item() == pytest.approx(iou_by_pixels(one, other), abs=1e-6)


@pytest.mark.parametrize("band", [(0.5, 0.6), (0.6, 0.7)], ids=str)
def test_boxes_of_a_band_are_the_noisy_boxes_that_lie_in_it(band, generator):
    """Rejection sampling: same distribution as noisy boxes under the condition, compared by quantiles."""
    truth = torch.tensor([[300.0, 400.0, 420.0, 480.0]]).expand(20000, 4)
    chosen = boxes_in_iou_band(truth, 1000, 1000, *band, generator)
    overlap = box_iou(chosen, truth)
    assert (overlap >= band[0]).all()
    assert (overlap <= band[1]).all()
    noisy = noisy_boxes(truth.repeat(4, 1), 1000, 1000, generator)
    noisy_overlap = box_iou(noisy, truth.repeat(4, 1))
    wanted = noisy[(noisy_overlap >= band[0]) & (noisy_overlap <= band[1])]
    quantiles, sides = torch.linspace(0.05, 0.95, 10), torch.tensor([120, 80])
    for values, expected in (
        (chosen[:, :2], wanted[:, :2]),
        (chosen[:, 2:], wanted[:, 2:]),
        (chosen[:, 2:] - chosen[:, :2], wanted[:, 2:] - wanted[:, :2]),
    ):
        difference = (values.quantile(quantiles, 0) - expected.quantile(quantiles, 0)) / sides
        assert difference.abs().max() < 0.02


@pytest.mark.parametrize("band", [(0.5, 0.6), (0.6, 0.7), (0.9, 0.91)], ids=str)
def test_band_holds_for_objects_of_one_pixel_at_the_rim_and_of_the_whole_picture(band, generator):
    truth = torch.tensor(
        [[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 79.0, 59.0], [79.0, 59.0, 79.0, 59.0], [0.0, 3.0, 0.0, 50.0]]
    )
    widened = truth.clone()
    widened[0, 2:] += 1
    widened[2, :2] -= 1
    widened[3, 2] += 1
    for _ in range(100):
        boxes = boxes_in_iou_band(truth, *SIZE, *band, generator)
        overlap = box_iou(boxes, widened)
        assert (overlap >= band[0]).all()
        assert (overlap <= band[1]).all()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([79.0, 59.0])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_band_holds_where_no_noisy_box_reaches_it(generator):
    truth = torch.tensor([[100.0, 200.0, 300.0, 240.0]]).expand(5000, 4)
    boxes = boxes_in_iou_band(truth, 1000, 1000, 0.2, 0.3, generator, scale=0.01)
    overlap = box_iou(boxes, truth)
    assert overlap.min() >= 0.2
    assert overlap.max() <= 0.3
    assert overlap.mean() == pytest.approx(0.25, abs=0.002)
    shift = (boxes[:, :2] + boxes[:, 2:] - truth[:, :2] - truth[:, 2:]).mean(0) / 2
    assert (shift.abs() < torch.tensor([4, 0.8])).all()


@pytest.mark.parametrize(("band", "size"), [((0.6, 0.5), SIZE), ((0.5, 1.0), SIZE), ((0.5, 0.6), (1, 80))], ids=str)
def test_impossible_band_is_refused(band, size, generator):
    with pytest.raises(ValueError, match="expected"):
        boxes_in_iou_band(torch.tensor([[0.0, 0.0, 5.0, 5.0]]), *size, *band, generator)


def ellipse(height, width, y, x, radius_y, radius_x):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows - y) / radius_y) ** 2 + ((columns - x) / radius_x) ** 2 <= 1


def test_coarse_masks_are_near_the_object_and_as_often_too_large_as_too_small(generator):
    mask = ellipse(200, 256, 110, 90, 40, 60)
    logits = coarse_masks(mask.expand(150, -1, -1), (256, 256), generator)
    assert logits.shape == (150, 1, 256, 256)
    assert logits.abs().max() <= 10
    assert not (logits[:, :, 200:] > 0).any()  # the padding below the picture
    coarse, framed = logits[:, 0, :200] > 0, mask[None]
    overlap = (coarse & framed).sum((1, 2)) / (coarse | framed).sum((1, 2))
    assert 0.75 < overlap.mean() < 0.92
    assert overlap.std() > 0.03
    assert overlap.min() > 0.45
    larger = (coarse.sum((1, 2)) > mask.sum()).float().mean()
    assert 0.35 < larger < 0.65


def test_coarse_mask_lies_in_sams_frame_whatever_the_size_of_the_picture(generator):
    """The same object in a picture and in SAM's square input frame: the same place in the mask input."""
    mask = ellipse(300, 400, 200, 100, 60, 80)
    frame = torch.zeros(1024, 1024, dtype=torch.bool)
    frame[:768] = torch.nn.functional.interpolate(mask[None, None].float(), (768, 1024))[0, 0] > 0
    found = [coarse_masks(one[None], (256, 256), generator.manual_seed(3)) > 0 for one in (mask, frame)]
    assert (found[0] & found[1]).sum() / (found[0] | found[1]).sum() > 0.97


@pytest.mark.parametrize("size", [(256, 256), (128, 128), (32, 32)], ids=str)
def test_coarse_mask_of_a_dot_or_a_thread_is_never_empty(size, generator):
    thread = torch.zeros(SIZE, dtype=torch.bool)
    thread[7] = True
    masks = torch.stack([rectangle(5, 5, 7, 7), thread, rectangle(0, 59, 0, 79), rectangle(59, 59, 79, 79)])
    for _ in range(30):
        assert (coarse_masks(masks, size, generator) > 0).flatten(1).any(1).all()
    with pytest.raises(ValueError, match="masks: expected at least one pixel"):
        coarse_masks(masks & False, size, generator)


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


def test_every_kind_of_the_mix_can_be_drawn_and_is_reproducible():
    masks = torch.stack([rectangle(10, 20, 30, 50), rectangle(5, 5, 7, 7)])
    assert set(ROBUST.kinds()[0]) <= set(PROMPT_KINDS)
    for kind in PROMPT_KINDS:
        first, second = (
            draw_prompts(kind, masks, torch.tensor([0, 1]), torch.Generator().manual_seed(1), mask_size=(64, 64))
            for _ in range(2)
        )
        given = [name for name in ("points", "boxes", "masks") if getattr(first, name) is not None]
        assert len(given) == 1
        assert torch.equal(getattr(first, given[0]), getattr(second, given[0]))


def test_band_and_coarse_kinds_are_what_their_names_say(generator):
    masks = rectangle(10, 40, 20, 60).expand(50, -1, -1)
    truth, index = boxes_from_masks(masks), torch.zeros(50, dtype=torch.long)
    for kind, low, high in (("box_50_60", 0.5, 0.6), ("box_60_70", 0.6, 0.7)):
        overlap = box_iou(draw_prompts(kind, masks, index, generator).boxes, truth)
        assert low <= overlap.min()
        assert overlap.max() <= high
    assert draw_prompts("coarse_mask", masks, index, generator, mask_size=(128, 128)).masks.shape == (50, 1, 128, 128)


def test_unknown_kind_is_named(generator):
    with pytest.raises(ValueError, match="kind: expected one of gt_box"):
        draw_prompts("scribble", rectangle(1, 2, 3, 4)[None], torch.tensor([0]), generator)


def test_a_mix_is_read_and_what_it_does_not_name_does_not_occur():
    mix = PromptMix.parsed("noisy_box=3, one_point=1.5,gt_box=0")
    assert mix.kinds() == (["noisy_box", "one_point"], [3.0, 1.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected KIND=FREQUENCY"),
        ("noisy_box", "expected KIND=FREQUENCY"),
        ("noisy_box=many", "expected KIND=FREQUENCY"),
        ("box=1", "got 'box=1'"),
        ("noisy_box=1,noisy_box=2", "expected KIND=FREQUENCY"),
        ("noisy_box=-1", "at least 0, got noisy_box=-1"),
        ("noisy_box=inf", "finite frequencies"),
        ("noisy_box=nan", "finite frequencies"),
        ("noisy_box=0", "above 0"),
    ],
)
def test_what_is_no_mix_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^mix: .*{message}"):
        PromptMix.parsed(text)
