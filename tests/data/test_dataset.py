"""Finding, reading and framing pictures with masks."""

import json
import shutil
import struct
import zlib

import cv2
import numpy as np
import pytest

from stable_sam_cuda.data.augmentation import augmented
from stable_sam_cuda.data.dataset import (
    check_samples,
    choose_samples,
    crop_square,
    find_masked_images,
    fit_square,
    object_masks,
)


def test_tree_of_sets_is_found_with_names(picture_folder):
    samples = find_masked_images(picture_folder)
    assert [sample.name for sample in samples][:5] == [f"ellipses/{i}" for i in range(4)] + ["ovals/0"]
    assert {sample.set_name for sample in samples} == {"ellipses", "ovals"}


def test_one_folder_is_a_set_of_its_own_name(picture_folder):
    assert [sample.name for sample in find_masked_images(picture_folder / "ovals")] == [f"ovals/{i}" for i in range(4)]


def test_split_chooses_and_unknown_split_is_named(picture_folder, tmp_path):
    root = shutil.copytree(picture_folder, tmp_path / "root")
    (root / "splits.json").write_text(json.dumps({"val": ["ovals/2"], "broken": ["ovals/9"]}))
    assert [sample.name for sample in find_masked_images(root, "val")] == ["ovals/2"]
    with pytest.raises(ValueError, match="split: expected one of"):
        find_masked_images(root, "holdout")
    with pytest.raises(ValueError, match="the first is ovals/9"):
        find_masked_images(root, "broken")


def test_limit_is_reproducible_and_exclude_leaves_sets_out(picture_folder):
    first, second = (choose_samples(picture_folder, None, limit=3, seed=1) for _ in range(2))
    assert [one.name for one in first] == [one.name for one in second]
    assert len(first) == 3
    assert {sample.set_name for sample in choose_samples(picture_folder, None, ["ovals"])} == {"ellipses"}
    with pytest.raises(ValueError, match="exclude"):
        choose_samples(picture_folder, None, ["ovals", "ellipses"])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"", "got no JSON"),
        (b"{", "got no JSON"),
        (b"\xff\xfe\x00", "got no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "expected an object of lists of names"),
        (b"NaN", "expected an object of lists of names"),
        (b"null", "expected an object of lists of names"),
        (b'{"val": "ovals/2"}', "'val': expected a list of names"),
        (b'{"val": {"ovals/2": 1}}', "'val': expected a list of names"),
        (b'{"val": NaN}', "'val': expected a list of names"),
        (b'{"val": [NaN]}', "'val': expected names, got nan"),
        (b'{"val": [2]}', "'val': expected names, got 2"),
        (b'{"val": [["ovals/2"]]}', "'val': expected names"),
        (b'{"val": ["ovals/2", "ovals/2"]}', "expected each name once, got 'ovals/2' twice"),
        (b'{"val": ["ovals/2"], "val": ["ovals/1"]}', "expected each name once, got 'val' twice"),
        (b'{"val": []}', "split 'val': expected names of pictures, got an empty list in "),
    ],
    ids=lambda value: value[:24].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_broken_splits_are_refused_in_one_line_with_the_file(written, message, picture_folder, tmp_path):
    root = shutil.copytree(picture_folder, tmp_path / "root")
    (root / "splits.json").write_bytes(written)
    with pytest.raises(ValueError, match=r"root/splits\.json") as caught:
        find_masked_images(root, "val")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splits_may_have_a_byte_order_mark_and_name_what_is_missing_in_print(picture_folder, tmp_path):
    root = shutil.copytree(picture_folder, tmp_path / "root")
    (root / "splits.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"val": ["ovals/2"], "odd": ["a\nb"]}).encode())
    assert [sample.name for sample in find_masked_images(root, "val")] == ["ovals/2"]
    with pytest.raises(ValueError, match=r"the first is 'a\\nb'"):
        find_masked_images(root, "odd")


def test_sets_that_are_not_there_and_limits_below_one_are_refused(picture_folder):
    with pytest.raises(ValueError, match=r"exclude: expected sets of .* \(ellipses, ovals\), got 'oval'"):
        choose_samples(picture_folder, None, ["ovals", "oval"])
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"limit: expected 1 or more, got {limit}"):
            choose_samples(picture_folder, None, limit=limit)


def test_a_set_outside_of_the_split_may_be_excluded(picture_folder, tmp_path):
    root = shutil.copytree(picture_folder, tmp_path / "root")
    (root / "splits.json").write_text(json.dumps({"val": ["ovals/2"]}))
    assert [one.name for one in choose_samples(root, "val", ["ellipses"])] == ["ovals/2"]


class Failing:
    """A sample that cannot be loaded."""

    name, set_name = "set/bad", "set"

    def __init__(self, error):
        self.error = error

    def load(self):
        raise self.error


DATA_ERRORS = [ValueError("x"), OSError("x"), MemoryError(), RecursionError("x"), EOFError("x"), struct.error("x"),
               zlib.error("x"), OverflowError("x"), cv2.error("x")]  # fmt: skip


@pytest.mark.parametrize("error", DATA_ERRORS, ids=lambda error: type(error).__name__)
def test_what_damaged_data_raises_costs_its_sample_alone(error, picture_folder):
    good, broken = check_samples([Failing(error), *find_masked_images(picture_folder)])
    assert len(good) == 8
    assert [name for name, _ in broken] == ["set/bad"]


def test_a_defect_of_a_reader_is_not_hidden_but_names_the_sample():
    with pytest.raises(RuntimeError, match="set/bad: reading it failed with KeyError: 'x'"):
        check_samples([Failing(KeyError("x"))])


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data: expected images/ and masks/"):
        find_masked_images(tmp_path)


def test_mask_of_another_size_or_unreadable_is_named(picture_folder, tmp_path):
    root = shutil.copytree(picture_folder / "ovals", tmp_path / "ovals")
    cv2.imwrite(str(root / "masks" / "0.png"), np.zeros((3, 3), np.uint8))
    (root / "images" / "1.png").write_bytes(b"no picture")
    samples = find_masked_images(root)
    with pytest.raises(ValueError, match="ovals/0: picture has size"):
        samples[0].load()
    with pytest.raises(ValueError, match=r"photo .*ovals/images/1.png: expected a picture"):
        samples[1].load()


def test_broken_pairs_are_told_by_name_and_the_others_kept(picture_folder, tmp_path):
    root = shutil.copytree(picture_folder, tmp_path / "root")
    ovals = root / "ovals"
    cv2.imwrite(str(ovals / "masks" / "0.png"), np.ones((3, 3), np.uint8))
    whole = (ovals / "images" / "1.png").read_bytes()
    (ovals / "images" / "1.png").write_bytes(whole[: len(whole) // 2])
    (ovals / "masks" / "2.png").unlink()
    (ovals / "images" / "3.png").unlink()
    empty = np.zeros_like(cv2.imread(str(root / "ellipses" / "masks" / "1.png")))
    cv2.imwrite(str(root / "ellipses" / "masks" / "1.png"), empty)
    heard = []
    good, broken = check_samples(find_masked_images(root), heard.append)
    assert sum(heard) == 8
    assert [sample.name for sample in good] == ["ellipses/0", "ellipses/2", "ellipses/3"]
    reasons = dict(broken)
    assert list(reasons) == ["ellipses/1", "ovals/0", "ovals/1", "ovals/2", "ovals/3"]
    assert reasons["ellipses/1"] == "the mask is empty"
    assert "picture has size" in reasons["ovals/0"]
    assert "expected an undamaged picture" in reasons["ovals/1"]
    assert "masks/2.png: expected a picture file, got a path where no file is" in reasons["ovals/2"]
    assert "images/3.jpg: expected a picture file, got a path where no file is" in reasons["ovals/3"]
    assert not any("\n" in reason for reason in reasons.values())


def test_split_without_a_file_of_splits_and_a_name_twice_are_refused(picture_folder, tmp_path):
    with pytest.raises(ValueError, match="split: expected splits named in"):
        find_masked_images(picture_folder, "val")
    root = shutil.copytree(picture_folder / "ovals", tmp_path / "ovals")
    shutil.copytree(root / "images", root / "im")
    shutil.copytree(root / "masks", root / "gt")
    with pytest.raises(ValueError, match="got two pictures named ovals/0") as caught:
        find_masked_images(root)
    assert f"{root}/images/0.png with {root}/masks/0.png and {root}/im/0.png with {root}/gt/0.png;" in str(caught.value)
    assert "move the pictures and masks of one of them" in str(caught.value)


def test_pictures_of_one_name_in_two_coco_files_are_named_with_what_helps(picture_folder, tmp_path):
    root = shutil.copytree(picture_folder / "ovals", tmp_path / "ovals")
    height, width = cv2.imread(str(root / "images" / "0.png")).shape[:2]
    images = [{"id": 1, "file_name": "0.png", "height": height, "width": width}]
    annotations = [{"id": 1, "image_id": 1, "segmentation": [[2, 2, 20, 2, 20, 20]]}]
    written = json.dumps({"images": images, "annotations": annotations})
    for name in ("one", "two"):
        (root / f"{name}.coco.json").write_text(written)
    shutil.move(root / "masks", tmp_path / "masks")
    with pytest.raises(ValueError, match=r"0\.png of .*one\.coco\.json and .*0\.png of .*two\.coco\.json; give one"):
        find_masked_images(root)
    assert len(find_masked_images(root / "two.coco.json")) == 1
    shutil.move(tmp_path / "masks", root / "masks")
    (root / "two.coco.json").unlink()
    with pytest.raises(
        ValueError, match=r"masks/0\.png and .*one\.coco\.json; take one layout: --layout coco or folders"
    ):
        find_masked_images(root)


def test_objects_come_by_id_and_small_ones_can_be_left_out():
    ids = np.zeros((6, 6), np.uint8)
    ids[:2, :2], ids[5, 5], ids[3:5, :] = 1, 7, 255
    assert [mask.sum() for mask in object_masks(ids)] == [4, 1, 12]
    assert [mask.sum() for mask in object_masks(ids, 4)] == [4, 12]


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (20, 30), (300, 301)], ids=str)
def test_frame_fits_the_longest_side_and_pads_with_nothing(shape):
    ids = np.full(shape, 3, np.uint8)
    image, framed = fit_square(np.full((*shape, 3), 200, np.uint8), ids, 128)
    height, width = (round(side * 128 / max(shape)) for side in shape)
    assert (framed[:height, :width] == 3).all()
    assert framed.sum() == 3 * height * width
    assert (image[:height, :width] == 200).all()
    assert image.sum() == 600 * height * width


def test_window_shows_the_scaled_picture_at_its_place():
    rng = np.random.default_rng(0)
    ids = cv2.resize(rng.integers(0, 5, (8, 10), dtype=np.uint8), (100, 80), interpolation=cv2.INTER_NEAREST)
    image = np.repeat(ids[..., None] * 40, 3, 2).astype(np.uint8)
    _, window = crop_square(image, ids, 50, 2.0, (60, 90))
    whole = cv2.resize(ids, (200, 160), interpolation=cv2.INTER_NEAREST)
    assert (window == whole[60:110, 90:140]).all()


def test_augmentation_is_reproducible_and_keeps_picture_and_mask_together():
    image, ids = np.zeros((90, 70, 3), np.uint8), np.zeros((90, 70), np.uint8)
    ids[20:60, 10:50] = 1
    image[ids == 1] = 250
    for seed in range(20):
        window, window_ids = augmented(image, ids, 64, np.random.default_rng(seed))
        again, _ = augmented(image, ids, 64, np.random.default_rng(seed))
        assert (window == again).all()
        assert window_ids.any()
        bright = window.mean(2) > (int(window.max()) + int(window.min())) / 2
        union = (bright | (window_ids == 1)).sum()
        assert (bright & (window_ids == 1)).sum() / union > 0.85
