"""Occluders hide what they are told to, and nothing else of the picture changes."""

import numpy as np
import pytest

from stable_sam_cuda.data.dataset import check_samples, find_masked_images
from stable_sam_cuda.data.occlusion import cut_out, cutouts, occlude, occluded_images, targets

GREY, RED = 90, np.array([220, 20, 40], np.uint8)


def ellipse(height, width, y, x, radius_y, radius_x):
    rows, columns = np.mgrid[:height, :width]
    return ((rows - y) / radius_y) ** 2 + ((columns - x) / radius_x) ** 2 <= 1


@pytest.fixture
def scene():
    """A grey picture with a target in it."""
    return np.full((160, 220, 3), GREY, np.uint8), ellipse(160, 220, 80, 100, 40, 60)


@pytest.fixture
def disc():
    """A red disc, cut out of a green picture."""
    mask = ellipse(90, 90, 45, 45, 25, 25)
    image = np.zeros((90, 90, 3), np.uint8)
    image[..., 1] = 255
    image[mask] = RED
    return cut_out(image, mask)


def test_cutout_is_the_object_with_a_margin(disc):
    assert disc.mask.shape == (53, 53)
    assert disc.mask.sum() == ellipse(90, 90, 45, 45, 25, 25).sum()
    assert (disc.image[disc.mask] == RED).all()
    opacity = disc.opacity()
    assert opacity.min() == 0
    assert opacity.max() == 1
    assert not opacity[~disc.mask].any()
    assert ((opacity > 0) & (opacity < 1)).sum() > 100  # a rim of some 2 pixels around a disc of radius 25


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.7])
def test_scaled_cutout_keeps_its_shape(factor, disc):
    scaled = disc.scaled(factor)
    assert scaled.mask.sum() == pytest.approx(disc.mask.sum() * factor**2, rel=0.05)
    assert scaled.image.shape[:2] == scaled.mask.shape
    assert not (scaled.mask[[0, -1]].any() or scaled.mask[:, [0, -1]].any())


@pytest.mark.parametrize("hidden", [(0.1, 0.5), (0.3, 0.32), (0.7, 0.95)], ids=str)
def test_hidden_part_lies_in_the_range_and_fills_it(hidden, scene, disc):
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(150):
        occlusion = occlude(*scene, disc, rng, hidden)
        part = 1 - (occlusion.visible & scene[1]).sum() / scene[1].sum()
        assert occlusion.hidden == pytest.approx(part)
        assert not (occlusion.visible & ~scene[1]).any()
        parts.append(part)
    assert hidden[0] <= min(parts)
    assert max(parts) <= hidden[1]
    middle, width = (hidden[0] + hidden[1]) / 2, hidden[1] - hidden[0]
    assert np.mean(parts) == pytest.approx(middle, abs=0.1 * width)
    assert np.std(parts) == pytest.approx(width / 12**0.5, rel=0.2)


def test_pasted_pixels_are_the_cutouts_and_all_others_the_pictures(scene, disc):
    image, mask = scene
    for seed in range(20):
        occlusion = occlude(image, mask, disc, np.random.default_rng(seed))
        changed = (occlusion.image != image).any(2)
        assert (mask & ~occlusion.visible & ~changed).sum() == 0  # what is hidden has other pixels
        assert occlusion.image[..., 1].max() <= GREY  # nothing of the green surroundings
        pure = (occlusion.image == RED).all(2)
        rim = changed & ~pure
        assert pure.sum() > 0.6 * changed.sum()
        assert 0 < rim.sum() < 0.4 * changed.sum()


def test_occluders_come_from_all_sides(scene, disc):
    centres = []
    for seed in range(80):
        occlusion = occlude(*scene, disc, np.random.default_rng(seed))
        centres.append(np.argwhere((occlusion.image != GREY).any(2)).mean(0) - (80, 100))
    quadrants = {(bool(y > 0), bool(x > 0)) for y, x in centres}
    assert len(quadrants) == 4
    assert np.abs(np.mean(centres, 0)).max() < 12


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(scene, disc):
    one, same, other = (occlude(*scene, disc, np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert (one.image == same.image).all()
    assert (one.visible == same.visible).all()
    assert (one.image != other.image).any()


def test_target_at_the_rim_and_a_cutout_larger_than_the_picture(disc):
    image = np.full((30, 40, 3), GREY, np.uint8)
    mask = np.zeros((30, 40), bool)
    mask[10:, 20:] = True
    large = disc.scaled(6)
    for seed in range(30):
        assert 0.2 <= occlude(image, mask, large, np.random.default_rng(seed), (0.2, 0.4)).hidden <= 0.4


def test_what_cannot_be_hidden_in_part_is_an_error(scene, disc):
    image, _ = scene
    pixel = np.zeros(image.shape[:2], bool)
    with pytest.raises(ValueError, match="mask: expected at least one pixel"):
        occlude(image, pixel, disc, np.random.default_rng(0))
    pixel[5, 5] = True
    with pytest.raises(ValueError, match=r"cutout: expected one that can hide 0.1 to 0.5 of an object of 1 pixels"):
        occlude(image, pixel, disc, np.random.default_rng(0))
    with pytest.raises(ValueError, match="hidden: expected 0 < low <= high < 1"):
        occlude(*scene, disc, np.random.default_rng(0), (0.5, 0.1))
    with pytest.raises(ValueError, match="mask: expected booleans of the picture's size"):
        occlude(image, pixel[:-1], disc, np.random.default_rng(0))


def test_occluded_pictures_are_recipes_with_names_of_their_own(picture_folder):
    samples = find_masked_images(picture_folder)
    heard = []
    made = occluded_images(samples, 12, seed=1, hidden=(0.2, 0.4), progress=heard.append)
    assert len(made) == sum(heard) == 12
    assert len({sample.name for sample in made}) == 12
    assert {sample.set_name for sample in made} <= {"ellipses", "ovals"}
    assert {sample.base.name for sample in made} >= {sample.name for sample in samples if targets(sample)}
    assert occluded_images(samples, 12, seed=1, hidden=(0.2, 0.4)) == made
    assert occluded_images(samples, 12, seed=2, hidden=(0.2, 0.4)) != made
    assert check_samples(made) == (made, [])
    for sample in made:
        image, ids = sample.load()
        again, _ = sample.load()
        assert (image == again).all()
        target = sample.base.load()[1] == sample.target
        assert set(np.unique(ids)) == {0, 1}
        assert 0.2 <= 1 - ids.sum() / target.sum() <= 0.4
        assert sample.donor_target in cutouts(sample.donor)
        assert sample.donor.name != sample.base.name


def test_whole_masks_keep_the_hidden_part(picture_folder):
    samples = find_masked_images(picture_folder)
    visible, whole = (occluded_images(samples, 3, whole=whole) for whole in (False, True))
    for seen, full in zip(visible, whole, strict=True):
        assert seen.name == full.name  # the picture is the same
        assert (seen.load()[0] == full.load()[0]).all()
        assert (full.load()[1].astype(bool) == (full.base.load()[1] == full.target)).all()
        assert full.load()[1].sum() > seen.load()[1].sum()


def test_too_few_objects_are_an_error(picture_folder):
    with pytest.raises(ValueError, match=r"occlusions: expected 2 pictures with objects to hide .* among 1, found 0"):
        occluded_images(find_masked_images(picture_folder)[:1], 2)
