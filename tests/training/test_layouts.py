"""Data sets as they lie on disk: found, named, and joined to their masks."""

import json

import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.training.dataset import check_samples, find_masked_images
from stable_sam_cuda.training.layouts import find_samples

SQUARE = np.zeros((16, 24), np.uint8)
SQUARE[4:10, 5:15] = 255


def put(folder, *names):
    """Pictures (RGB) and masks (grey) by the given names; a name that starts with "mask:" is a mask."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        kind, _, file = name.rpartition(":")
        picture = Image.fromarray(SQUARE if kind else np.repeat(SQUARE[..., None], 3, 2))
        picture.save(folder / file)


@pytest.fixture
def hqseg(tmp_path):
    """HQSeg-44K and its test sets, two pictures each, as HQ-SAM's users have them."""
    root = tmp_path / "data"
    for part in ("DIS-TR", "DIS-VD"):
        put(root / "DIS5K" / part / "im", "1#a.jpg", "2#b.jpg")
        put(root / "DIS5K" / part / "gt", "mask:1#a.png", "mask:2#b.png")
    thin = root / "thin_object_detection"
    for part in ("train", "test"):
        put(thin / "ThinObject5K" / f"images_{part}", "x.jpg", "y.jpg")
        put(thin / "ThinObject5K" / f"masks_{part}", "mask:x.png", "mask:y.png")
    put(thin / "COIFT" / "images", "x.jpg", "y.jpg")
    put(thin / "COIFT" / "masks", "mask:x.png", "mask:y.png")
    put(thin / "HRSOD" / "images", "x.jpg", "y.jpg")
    put(thin / "HRSOD" / "masks_max255", "mask:x.png", "mask:y.png")
    put(thin / "HRSOD" / "masks", "mask:x.png", "mask:y.png")
    for part in ("DUTS-TR", "DUTS-TE", "ecssd", "fss_all", "MSRA_10K"):
        put(root / "cascade_psp" / part, "0001.jpg", "mask:0001.png", "0002.jpg", "mask:0002.png")
    return root


def test_hqseg_is_found_with_every_set(hqseg):
    samples = find_masked_images(hqseg)
    names = [sample.name for sample in samples]
    assert len(names) == 2 * 11
    assert {sample.set_name for sample in samples} == {
        "DIS5K/DIS-TR",
        "DIS5K/DIS-VD",
        "thin_object_detection/ThinObject5K/train",
        "thin_object_detection/ThinObject5K/test",
        "thin_object_detection/COIFT",
        "thin_object_detection/HRSOD",
        *(f"cascade_psp/{name}" for name in ("DUTS-TR", "DUTS-TE", "ecssd", "fss_all", "MSRA_10K")),
    }
    good, broken = check_samples(samples)
    assert not broken
    for sample in good:
        _, ids = sample.load()
        assert (ids > 0).sum() == 60
    (coarse,) = {sample.mask.parent.name for sample in samples if "HRSOD" in sample.name}
    assert coarse == "masks_max255"


def test_a_layout_can_be_named(hqseg):
    counts = {layout: len(find_samples(hqseg, layout)) for layout in ("auto", "folders", "mixed", "coco")}
    assert counts == {"auto": 22, "folders": 12, "mixed": 10, "coco": 0}
    with pytest.raises(ValueError, match="layout: expected one of auto, folders, mixed, coco, got 'zip'"):
        find_samples(hqseg, "zip")


def test_the_set_itself_can_be_the_root(hqseg):
    assert [sample.name for sample in find_masked_images(hqseg / "cascade_psp" / "ecssd")] == [
        "ecssd/0001",
        "ecssd/0002",
    ]
    assert find_masked_images(hqseg / "DIS5K" / "DIS-VD")[0].name == "DIS-VD/1#a"


def test_picture_without_mask_in_a_mixed_folder_is_broken_and_a_folder_of_photographs_is_no_set(tmp_path):
    put(tmp_path / "set", "a.jpg", "mask:a.png", "b.jpg", "mask:c.png")
    put(tmp_path / "holiday", "a.jpg", "b.jpg")
    put(tmp_path / "screenshots", "x.png")
    good, broken = check_samples(find_masked_images(tmp_path))
    assert [sample.name for sample in good] == ["set/a"]
    assert [name for name, _ in broken] == ["set/b", "set/c"]


def test_masks_may_have_another_suffix_and_hidden_files_are_none(tmp_path):
    put(tmp_path / "images", "a.png", "b.webp", "c.jpg")
    put(tmp_path / "masks", "mask:a.bmp", "mask:b.png", "mask:b.bmp", "mask:c.tif")
    (tmp_path / "images" / "._a.png").write_bytes(b"")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"")
    samples = find_masked_images(tmp_path)
    assert [sample.mask.name for sample in samples] == ["a.bmp", "b.png", "c.tif"]
    assert check_samples(samples)[1] == []


def test_two_pictures_of_one_stem_are_both_there(tmp_path):
    put(tmp_path / "set" / "images", "a.jpg", "a.png")
    put(tmp_path / "set" / "masks", "mask:a.png")
    assert [sample.name for sample in find_masked_images(tmp_path)] == ["set/a", "set/a.png"]


def test_a_file_that_is_no_coco_file_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a b c")
    with pytest.raises(ValueError, match="expected a COCO file, got no JSON"):
        find_samples(tmp_path / "list.txt")
    (tmp_path / "annotations.json").write_text(json.dumps({"via": 1}))
    with pytest.raises(ValueError, match="got other JSON"):
        find_samples(tmp_path / "annotations.json")
    assert find_samples(tmp_path) == []
    with pytest.raises(ValueError, match="data: expected a folder or a COCO file"):
        find_samples(tmp_path / "nowhere")
