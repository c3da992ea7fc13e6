"""The cache of image embeddings: right, resumable, and picky."""

import pytest
import torch

from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.training.dataset import find_masked_images, fit_square
from stable_sam_cuda.training.embeddings import EmbeddingCache, JoinedEmbeddings


@torch.inference_mode()
def test_embeddings_are_the_encoders(small_sam, picture_folder, tmp_path):
    samples = find_masked_images(picture_folder)
    cache = EmbeddingCache(tmp_path, small_sam, samples)
    cache.fill()
    image, _ = fit_square(*samples[3].load(), 64)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = small_sam.image_encoder(small_sam.preprocess(pixels))
    torch.testing.assert_close(cache[[3]], expected, rtol=1e-3, atol=1e-3)


def test_interrupted_cache_continues_where_it_stopped(small_sam, picture_folder, tmp_path):
    samples = find_masked_images(picture_folder)
    cache = EmbeddingCache(tmp_path, small_sam, samples)

    def stop_after_three(count):
        if cache.done.sum() == 3:
            cache._flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(stop_after_three)
    again = EmbeddingCache(tmp_path, small_sam, samples)
    assert again.done.sum() == 3
    finished = []
    again.fill(finished.append)
    assert len(finished) == len(samples) - 3
    assert again.done.all()


def test_cache_of_another_encoder_or_other_pictures_is_refused(small_sam, picture_folder, tmp_path):
    samples = find_masked_images(picture_folder)
    EmbeddingCache(tmp_path, small_sam, samples)
    with pytest.raises(ValueError, match="another names and shape"):
        EmbeddingCache(tmp_path, small_sam, samples[:2])
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="another encoder"):
        EmbeddingCache(tmp_path, new_sam_lite("lite0", 64), samples)


def test_joined_caches_are_one(small_sam, picture_folder, tmp_path):
    samples = find_masked_images(picture_folder)
    caches = [EmbeddingCache(tmp_path / "whole", small_sam, samples)]
    caches += [EmbeddingCache(tmp_path / str(start), small_sam, samples[start : start + 4]) for start in (0, 4)]
    for cache in caches:
        cache.fill()
    joined = JoinedEmbeddings(caches[1:])
    assert joined.samples == samples
    assert torch.equal(joined[[6, 0, 3, 4]], caches[0][[6, 0, 3, 4]])
    with pytest.raises(IndexError):
        joined[[8]]
