"""The cache of image embeddings: right for any pictures and encoders, by any number of processes, after any damage."""

import errno
import os
import shutil
import subprocess
import sys
import time
import warnings

import cv2
import numpy as np
import pytest
import shared_cache
import torch

from stable_sam_cuda.data.augmentation import augmented_images
from stable_sam_cuda.data.dataset import find_masked_images, fit_square
from stable_sam_cuda.data.embeddings import EmbeddingCache
from stable_sam_cuda.notes import DataWarning
from stable_sam_cuda.sam.lite import new_sam_lite


@torch.inference_mode()
def expected(sam, sample):
    """The embedding that a sample must have, to float16."""
    image, _ = fit_square(*sample.load(), 64)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return sam.image_encoder(sam.preprocess(pixels)).half().float()


def assert_right(cache):
    for index, sample in enumerate(cache.samples):
        torch.testing.assert_close(cache[[index]], expected(cache.sam, sample), rtol=1e-3, atol=1e-3)


def other_encoder():
    torch.manual_seed(5)
    return new_sam_lite("lite0", 64)


@pytest.fixture
def samples(picture_folder):
    return find_masked_images(picture_folder)[:4]


@pytest.fixture
def filled(small_sam, samples, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache", small_sam, samples)
    cache.fill()
    return cache


def reopened(cache, **changes):
    return EmbeddingCache(cache.folder.parent, cache.sam, changes.get("samples", cache.samples))


def computed(cache):
    """How many pictures go through the encoder when the cache is filled and read."""
    calls = []
    hook = cache.sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    cache.fill()
    cache[list(range(len(cache.samples)))]
    hook.remove()
    return len(calls)


def test_embeddings_are_the_encoders(filled):
    assert filled.done.all()
    assert_right(filled)
    assert filled[[3, 0]].dtype == torch.float32


def test_a_folder_of_other_pictures_with_the_same_names_has_its_own(small_sam, tmp_path):
    """Both in one cache, in either order, and with one more picture that is in both."""
    rng = np.random.default_rng(0)
    for site in ("a", "b"):
        for part in ("images", "masks"):
            (tmp_path / site / "data" / part).mkdir(parents=True)
        for stem in range(3):
            image = rng.integers(0, 255, (40, 50, 3), np.uint8) if stem else np.full((40, 50, 3), 7, np.uint8)
            cv2.imwrite(str(tmp_path / site / "data" / "images" / f"{stem}.png"), image)
            cv2.imwrite(str(tmp_path / site / "data" / "masks" / f"{stem}.png"), np.eye(40, 50, dtype=np.uint8) * 255)
    first, second = (find_masked_images(tmp_path / site) for site in ("a", "b"))
    assert [one.name for one in first] == [one.name for one in second]
    caches = [EmbeddingCache(tmp_path / "cache", small_sam, one) for one in (first, second)]
    assert [computed(cache) for cache in caches] == [3, 2]
    for samples in (first, second):
        assert_right(EmbeddingCache(tmp_path / "cache", small_sam, samples))


def test_other_encoders_and_preprocessings_lie_side_by_side(filled, samples):
    darker = new_sam_lite("lite0", 64)
    darker.load_state_dict(filled.sam.state_dict())
    darker.pixel_mean += 3
    others = [EmbeddingCache(filled.folder.parent, sam, samples) for sam in (other_encoder(), darker)]
    for cache in others:
        assert not cache.done.any()
        cache.fill()
        assert_right(cache)
    assert_right(filled)
    assert len({cache.folder for cache in (filled, *others)}) == 3


def test_more_fewer_renamed_and_reordered_pictures_ask_for_what_is_new_alone(filled, picture_folder, tmp_path):
    assert computed(reopened(filled, samples=filled.samples[2:0:-1])) == 0
    shutil.copytree(picture_folder / "ellipses", tmp_path / "moved" / "images_of_mine")
    moved = find_masked_images(tmp_path / "moved")
    assert {one.name for one in moved}.isdisjoint(one.name for one in filled.samples)
    cache = reopened(filled, samples=[*moved, *augmented_images(filled.samples[:1], 2, 64, 0)])
    assert computed(cache) == 2
    assert_right(cache)


def test_a_picture_that_changes_on_disk_is_another(filled, picture_folder, tmp_path):
    shutil.copytree(picture_folder, tmp_path / "data")
    samples = find_masked_images(tmp_path / "data")[:4]
    image = cv2.imread(str(samples[1].image))
    cv2.imwrite(str(samples[1].image), 255 - image)
    cache = reopened(filled, samples=samples)
    assert cache.done.tolist() == [True, False, True, True]
    assert computed(cache) == 1
    assert_right(cache)


def test_a_picture_that_changes_while_the_run_goes_on_is_stored_as_what_was_read(small_sam, picture_folder, tmp_path):
    shutil.copytree(picture_folder, tmp_path / "data")
    samples = find_masked_images(tmp_path / "data")[:2]
    before = samples[0].image.read_bytes()
    cache = EmbeddingCache(tmp_path / "cache", small_sam, samples)
    cv2.imwrite(str(samples[0].image), 255 - cv2.imread(str(samples[0].image)))
    with pytest.warns(DataWarning, match="ellipses/0: the picture has changed"):
        cache.fill()
    assert_right(cache)
    assert cache.done.all()
    samples[0].image.write_bytes(before)
    again = EmbeddingCache(tmp_path / "cache", small_sam, samples)
    assert again.done.tolist() == [False, True]
    again.fill()
    assert_right(again)


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


DAMAGE = {
    "missing": None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "bit flipped": lambda content: flipped(content, len(content) // 2),
    "text": lambda content: b"not an embedding",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_costs_its_own_picture_and_is_said(damage, filled):
    path = filled.path(1)
    content = path.read_bytes()
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](content))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = reopened(filled)
        assert computed(cache) == 1
    assert path.read_bytes() == content
    assert_right(cache)
    assert {one.message.reason for one in said} == (
        set() if damage == "missing" else {"a damaged embedding is computed anew"}
    )
    assert all(path.name in str(one.message) for one in said)


def test_the_embedding_of_another_picture_or_shape_under_this_name_is_damage(filled, tmp_path):
    paths = [filled.path(index) for index in range(3)]
    shutil.copy(paths[0], paths[1])
    other = EmbeddingCache(tmp_path / "small", new_sam_lite("lite0", 128), filled.samples)
    other.fill()
    shutil.copy(other.path(2), paths[2])
    with pytest.warns(DataWarning, match="damaged"):
        cache = reopened(filled)
        assert computed(cache) == 2
    assert_right(cache)


@pytest.mark.filterwarnings("ignore::stable_sam_cuda.notes.DataWarning")
def test_any_flipped_byte_leaves_the_embedding_right(filled):
    """Each byte of the zip file's own, some of the numbers: what does not matter is read, all else is computed."""
    path, expected_one = filled.path(0), filled[[0]]
    content = path.read_bytes()
    ends = [*range(300), *range(len(content) - 300, len(content))]
    for place in [*ends, *range(300, len(content) - 300, 4001)]:
        path.write_bytes(flipped(content, place))
        assert torch.equal(filled[[0]], expected_one), place


def test_an_interrupted_filling_goes_on_where_it_stopped(small_sam, samples, tmp_path):
    cache = EmbeddingCache(tmp_path, small_sam, samples)

    def stop_after_three(count):
        if cache.done.sum() == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(stop_after_three)
    again = EmbeddingCache(tmp_path, small_sam, samples)
    assert again.done.sum() == 3
    finished = []
    again.fill(finished.append)
    assert finished == [1]
    assert again.done.all()


def test_what_appears_meanwhile_is_not_computed_again(small_sam, samples, tmp_path):
    one, other = (EmbeddingCache(tmp_path, small_sam, samples) for _ in range(2))
    one.fill()
    heard = []
    other.fill(heard.append)
    assert computed(other) == 0
    assert heard == [1] * len(samples)


def test_pictures_of_the_same_content_are_one(small_sam, picture_folder, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(picture_folder / "ovals", tmp_path / "data" / name)
    cache = EmbeddingCache(tmp_path / "cache", small_sam, find_masked_images(tmp_path / "data"))
    assert len(cache.samples) == 8
    assert computed(cache) == 4
    assert cache.done.sum() == 8


def test_half_written_files_go_when_they_are_old(filled):
    old, new = (filled.folder / f".{name}.npz.0a1b2c3d.part" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert reopened(filled).done.all()
    assert not old.exists()
    assert new.exists()  # another process may be writing it


def test_a_cache_of_the_old_form_is_left_alone_and_said(small_sam, samples, tmp_path):
    for name in ("cache.json", "embeddings.npy", "done.npy"):
        (tmp_path / name).write_text("{}")
    with pytest.warns(DataWarning, match="earlier version is left alone"):
        cache = EmbeddingCache(tmp_path, small_sam, samples)
    cache.fill()
    assert_right(cache)
    assert (tmp_path / "embeddings.npy").read_text() == "{}"


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be made or replaced any more: root may write whatever the permissions say."""

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def begin():
        monkeypatch.setattr("stable_sam_cuda.data.embeddings.TemporaryFile", refuse)
        monkeypatch.setattr("stable_sam_cuda.data.embeddings.atomic_write", refuse)

    return begin


def test_a_read_only_cache_works_where_everything_is_there(filled, read_only):
    read_only()
    cache = reopened(filled)
    assert computed(cache) == 0
    assert_right(cache)
    path = filled.path(0)
    path.write_bytes(flipped(path.read_bytes(), 5000))
    with pytest.warns(DataWarning, match="could not be stored"):
        assert_right(reopened(filled))


def test_a_read_only_cache_that_lacks_something_is_an_error_at_the_start(filled, read_only):
    filled.path(2).unlink()
    read_only()
    with pytest.raises(OSError, match=r"cache: 1 of 4 embeddings are missing, and the folder cannot be written.*Read"):
        reopened(filled)


def test_a_file_in_the_folders_place_is_an_error_that_names_it(small_sam, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written.*file/"):
        EmbeddingCache(tmp_path / "file", small_sam, samples)


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(small_sam, samples, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=4 * 32768)
    with monkeypatch.context() as patched:
        patched.setattr("stable_sam_cuda.data.embeddings.shutil.disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"No space left.*the embeddings of 4 pictures take 0.00 GiB.*cache"):
            EmbeddingCache(tmp_path / "cache", small_sam, samples)
        EmbeddingCache(tmp_path / "cache", small_sam, samples[:3]).fill()
        EmbeddingCache(tmp_path / "cache", small_sam, samples)  # one more fits


def test_a_disk_that_is_full_later_is_one_error_and_leaves_no_part(small_sam, samples, tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, small_sam, samples)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("stable_sam_cuda.files.os.replace", full)
        with pytest.raises(OSError, match=r"No space left on device.*npz"):
            cache.fill()
    assert not list(tmp_path.rglob("*.part"))
    assert not cache.done.any()
    cache.fill()
    assert_right(cache)


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_processes_that_begin_together_or_are_killed_leave_the_cache_right(times):
    words = ["--tries", str(times), "--kills", str(times), "--pictures", "20"]
    done = subprocess.run([sys.executable, shared_cache.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{times} of {times} right") == 3
