"""Digests of samples that are made of others; seeds that differ wherever their parts do."""

import itertools
import shutil
from dataclasses import replace

import cv2
import pytest
import torch

from stable_sam_cuda.data.augmentation import augmented_images
from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.digests import Digests, MadeSample, content_digest, seed_of
from stable_sam_cuda.data.occlusion import OccludedImage, occluded_images
from stable_sam_cuda.data.prompts import ROBUST, draw_kind


@pytest.fixture
def samples(picture_folder):
    return find_masked_images(picture_folder)


@pytest.fixture
def made(samples):
    return [*augmented_images(samples, 2, 64, seed=0), *occluded_images(samples, 4), *occluded_images(samples, 4, 1)]


def test_what_is_made_knows_its_digests_by_itself_and_from_its_parts(samples, made):
    every, digests = [*samples, *made], Digests()
    assert not any(isinstance(sample, MadeSample) for sample in samples)
    assert all(isinstance(sample, MadeSample) for sample in made)
    assert digests.of_samples(every) == [sample.digest() for sample in every]
    assert digests.of_pictures(every) == [sample.picture_digest() for sample in every]
    assert len(set(digests.of_pictures(every))) == len(every)


def test_each_file_is_read_once(samples, made, monkeypatch):
    read = []
    real = type(samples[0]).digest
    monkeypatch.setattr(type(samples[0]), "digest", lambda sample: read.append(sample.name) or real(sample))
    digests = Digests()
    for _ in range(2):
        digests.of_samples([*samples, *made])
        digests.of_pictures(made)
    assert sorted(read) == sorted(sample.name for sample in samples)


def test_pictures_whose_parts_change_are_others(samples, tmp_path):
    """Names stay, digests do not: a mask shapes a made picture, too."""
    one = OccludedImage(samples[0], 1, samples[1], 1, 5, (0.1, 0.5))
    mask = cv2.imread(str(samples[1].mask), cv2.IMREAD_UNCHANGED)
    mask[0, 0] = 1
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    remasked = replace(samples[1], mask=tmp_path / "mask.png")
    cv2.imwrite(str(tmp_path / "image.png"), 255 - cv2.imread(str(samples[1].image)))
    repainted = replace(samples[1], image=tmp_path / "image.png")
    for donor in (remasked, repainted):
        other = replace(one, donor=donor)
        assert other.name == one.name
        assert other.picture_digest() != one.picture_digest()
        assert len({variant.picture_digest() for variant in augmented_images([donor, samples[1]], 1, 64, 0)}) == 2


def test_whole_masks_are_other_objects_on_the_same_picture(samples):
    one = OccludedImage(samples[0], 1, samples[1], 1, 5, (0.1, 0.5))
    whole = replace(one, whole=True)
    assert whole.picture_digest() == one.picture_digest()
    assert whole.digest() != one.digest()


def test_one_digest_of_all_follows_names_order_and_content_and_survives_what_is_broken(picture_folder, tmp_path):
    shutil.copytree(picture_folder, tmp_path / "own")  # the folder is that of other tests, too
    samples = find_masked_images(tmp_path / "own")
    whole = content_digest(samples)
    assert whole == content_digest(samples) != content_digest(samples[::-1])
    samples[0].mask.write_bytes(b"no picture")
    broken = content_digest(samples)
    samples[0].mask.unlink()
    assert len({whole, broken, content_digest(samples), content_digest(samples[1:])}) == 4


def test_every_part_changes_what_a_generator_draws() -> None:
    parts = itertools.product(range(3), ("ecssd/0001", "ecssd/0002"), range(5), ("gt_box", "noisy_box"))
    draws = [torch.rand(2, generator=torch.Generator().manual_seed(seed_of(*each))) for each in parts]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws) == 60


def test_the_same_parts_give_the_same_seed_everywhere() -> None:
    assert seed_of(0, "ecssd/0001", 3) == 6179346801628794899


def test_first_draws_of_neighbouring_seeds_follow_the_mix() -> None:
    kinds = [draw_kind(ROBUST, torch.Generator().manual_seed(seed_of(0, step))) for step in range(600)]
    names, frequencies = ROBUST.kinds()
    for name, frequency in zip(names, frequencies, strict=True):
        assert abs(kinds.count(name) / 600 - frequency / sum(frequencies)) < 0.06, name
