"""Data sets as they lie on disk: found, named, and joined to their masks."""

import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.data.dataset import check_samples, find_masked_images
from stable_sam_cuda.data.layouts import find_samples
from stable_sam_cuda.notes import DataWarning

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


@pytest.mark.parametrize(
    "root",
    ["nowhere", "x" * 5000, "a\0b", "a\nb", os.fsdecode(b"caf\xe9")],
    ids=["none", "long", "nul", "line", "bytes"],
)
def test_a_root_that_is_none_is_refused_in_one_printable_line(root, tmp_path):
    with pytest.raises(ValueError, match="data: expected a folder or a COCO file, got") as caught:
        find_masked_images(tmp_path / root)
    assert str(caught.value).isprintable()


NESTED = {
    "plain": ("images", "masks", "{root}"),
    "dis5k": ("im", "gt", "{root}"),
    "thin_object": ("images_train", "masks_train", "{root}/train"),
    "hrsod": ("images", "masks_max255", "{root}"),
    "capitals": ("Images", "MASKS", "{root}"),
}


@pytest.mark.parametrize(("images", "masks", "name"), NESTED.values(), ids=NESTED)
def test_pictures_and_masks_may_lie_in_trees_of_the_same_form(images, masks, name, tmp_path):
    for part in ("", "train", "val", "val/deep/er"):
        put(tmp_path / images / part, "a.jpg")
        put(tmp_path / masks / part, "mask:a.png")
    put(tmp_path / images / "train", "b.jpg")
    put(tmp_path / images / "alone", "c.jpg")
    put(tmp_path / masks / "lonely", "mask:d.png")
    good, broken = check_samples(find_masked_images(tmp_path))
    start = name.format(root=tmp_path.name)
    assert [one.name for one in good] == [f"{start}/{part}a" for part in ("", "train/", "val/", "val/deep/er/")]
    assert [one for one, _ in broken] == [f"{start}/{one}" for one in ("alone/c", "lonely/d", "train/b")]
    assert all("expected a picture file, got a path where no file is" in reason for _, reason in broken)


def test_nested_folders_alone_and_parts_that_differ_in_case(tmp_path):
    put(tmp_path / "images" / "Train", "a.jpg")
    put(tmp_path / "masks" / "train", "mask:a.png")
    good, broken = check_samples(find_masked_images(tmp_path))
    assert [one.name for one in good] == [f"{tmp_path.name}/Train/a"]
    assert not broken


def test_names_that_differ_in_case_only_are_told_apart(tmp_path):
    for folder in ("images", "Images"):
        put(tmp_path / folder, f"{folder}.jpg")
    put(tmp_path / "masks", "mask:images.png")
    assert [one.name for one in find_masked_images(tmp_path)] == [f"{tmp_path.name}/images"]


ODD_NAMES = {
    "not_utf8": (b"caf\xe9", r"caf\xe9"),
    "utf8": ("caf\xe9".encode(), "caf\xe9"),
    "brackets": (b"a [final] (2)", "a [final] (2)"),
    "comma": (b"a, b", "a, b"),
    "line_feed": (b"a\nb", r"a\nb"),
    "escape": (b"a\x1b[31mb", r"a\x1b[31mb"),
    "dots": (b"a.b.c", "a.b.c"),
    "space": (b" a ", " a "),
    "markup": (b"[bold]a[", "[bold]a["),
}


@pytest.mark.parametrize(("raw", "shown"), ODD_NAMES.values(), ids=ODD_NAMES)
@pytest.mark.parametrize("suffix", [".png", ".PNG"])
def test_odd_names_are_found_and_can_be_printed(raw, shown, suffix, tmp_path):
    stem = os.fsdecode(raw)
    put(tmp_path / stem / "images", f"{stem}{suffix}")
    put(tmp_path / stem / "masks", f"mask:{stem}{suffix}")
    good, broken = check_samples(find_masked_images(tmp_path))
    assert [one.name for one in good] == [f"{shown}/{shown}"]
    assert not broken
    json.dumps(good[0].name).encode()


def test_names_that_print_alike_stay_different(tmp_path):
    for stem in (os.fsdecode(b"caf\xe9"), r"caf\xe9"):
        put(tmp_path / "images", f"{stem}.png")
        put(tmp_path / "masks", f"mask:{stem}.png")
    names = {one.name for one in find_masked_images(tmp_path)}
    assert names == {rf"{tmp_path.name}/caf\xe9", rf"{tmp_path.name}/caf\xe9~2"}


def test_splits_name_pictures_as_they_are_printed(tmp_path):
    stem = os.fsdecode(b"caf\xe9")
    put(tmp_path / "images", f"{stem}.png", "b.png")
    put(tmp_path / "masks", f"mask:{stem}.png", "mask:b.png")
    (tmp_path / "splits.json").write_text(json.dumps({"val": [rf"{tmp_path.name}/caf\xe9"]}))
    (sample,) = find_masked_images(tmp_path, "val")
    assert sample.load()[1].any()


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".jpe", ".JPG", ".bmp", ".pgm", ".jp2"])
def test_masks_of_any_usual_suffix_are_found(suffix, tmp_path):
    put(tmp_path / "images", "a.png")
    put(tmp_path / "masks", f"mask:a{suffix}")
    good, broken = check_samples(find_masked_images(tmp_path))
    assert not broken
    assert np.unique(good[0].load()[1]).tolist() == [0, 1]


@pytest.mark.parametrize("suffix", [".gif", ".jp2", ".avif", ".jfif", ".ppm", ".tga", ".dib"])
def test_pictures_of_any_suffix_that_can_be_read_are_taken_beside_their_mask(suffix, tmp_path):
    put(tmp_path / "masks", "mask:a.png")
    try:
        put(tmp_path / "images", f"a{suffix}")
    except (OSError, ValueError, KeyError):
        pytest.skip("this Pillow does not write such files")
    (tmp_path / "images" / "a.json").write_text("{}")
    good, broken = check_samples(find_masked_images(tmp_path))
    assert [one.image.name for one in good] == [f"a{suffix}"]
    assert not broken


@pytest.mark.parametrize("suffix", [".heic", ".cr2", ".npy", ""])
def test_files_that_cannot_be_read_are_named_by_their_own_names(suffix, tmp_path):
    for folder, other in (("images", "masks"), ("masks", "images")):
        root = tmp_path / folder
        put(root / other, "mask:a.png" if other == "masks" else "a.png", "mask:b.png" if other == "masks" else "b.png")
        put(root / folder, "b.png" if folder == "images" else "mask:b.png")
        (root / folder / f"a{suffix}").write_bytes(b"\0\0\0 ftypheic" + bytes(40))
        good, broken = check_samples(find_masked_images(root))
        assert [one.name for one in good] == [f"{folder}/b"]
        ((name, reason),) = broken
        assert name == f"{folder}/a"
        assert f"{folder}/a{suffix}: expected a picture" in reason
        assert "no file is" not in reason


def test_ids_in_masks_of_an_unusual_suffix_stay_ids(tmp_path):
    put(tmp_path / "images", "a.png")
    (tmp_path / "masks").mkdir()
    ids = np.zeros((16, 24), np.uint8)
    ids[2:8, 2:8], ids[9:15, 9:20] = 1, 2
    Image.fromarray(ids).save(tmp_path / "masks" / "a.tga")
    (sample,) = find_masked_images(tmp_path)
    assert (sample.load()[1] == ids).all()


def noted(root, **options):
    """Names of the samples below ``root`` and what was noted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = find_masked_images(root, **options)
    return [one.name for one in samples], [str(one.message) for one in caught]


def test_shared_and_second_masks_are_said_once(tmp_path):
    root = tmp_path / "set"
    put(root / "images", "a.jpg", "a.png", "b.jpg", "b.png", "c.png", "d.png")
    masks = ("mask:a.png", "mask:b.png", "mask:c.png", "mask:c.tif", "mask:d.png", "mask:d.tif")
    put(root / "masks_max255", *masks)
    put(root / "masks", "mask:a.png")
    names, notes = noted(tmp_path)
    assert names == [f"set/{one}" for one in ("a", "a.png", "b", "b.png", "c", "d")]
    told = [
        f"{root}/images/a.png: pictures that differ in the suffix from another one share its mask: 2,",
        f"{root}/masks: folders of masks beside the one that is used are left out: 1,",
        f"{root}/masks_max255/c.tif: masks that differ in the suffix from the one that is used are left out: 2,",
    ]
    assert [note.split(" the first")[0] for note in sorted(notes)] == told


INNER_PAIRS = {
    "beside_masks": ("images/train", "masks"),
    "images_in_images": ("images", "masks"),
    "deep": ("images/a/b", "masks"),
    "in_masks": ("masks/train", "images"),
    "other_names": ("im/train", "gt"),
}


@pytest.mark.parametrize("layout", ["auto", "folders"])
@pytest.mark.parametrize(("folder", "beside"), INNER_PAIRS.values(), ids=INNER_PAIRS)
def test_a_pair_inside_a_paired_tree_is_a_set_of_its_own(folder, beside, layout, tmp_path):
    put(tmp_path / folder / "images", "a.jpg", "b.jpg")
    put(tmp_path / folder / "masks", "mask:a.png", "mask:b.png")
    top = folder.split("/")[0]
    for one in {beside, top}:
        put(tmp_path / one, "mask:top.png" if one in ("masks", "gt") else "top.jpg")
    good, broken = check_samples(find_masked_images(tmp_path, layout=layout))
    assert sorted(one.name for one in good) == sorted([f"{folder}/a", f"{folder}/b", f"{tmp_path.name}/top"])
    assert not broken


def test_classes_named_as_a_pair_in_both_trees_stay_classes(tmp_path):
    for part in ("images", "masks"):
        put(tmp_path / "images" / part, "a.jpg")
        put(tmp_path / "masks" / part, "mask:a.png")
    good, broken = check_samples(find_masked_images(tmp_path))
    assert [one.name for one in good] == [f"{tmp_path.name}/{part}/a" for part in ("images", "masks")]
    assert not broken


@pytest.mark.parametrize("file", ["annotations.json", "sub/_annotations.coco.json"])
def test_a_coco_file_among_masked_pictures_is_said_and_used_where_there_are_no_masks(file, tmp_path):
    folder, name = (tmp_path / "images" / file).parent, file.rsplit("/", 1)[-1]
    put_coco(folder, name)
    put(tmp_path / "masks", "mask:b.png")
    put(tmp_path / "images", "b.jpg")
    names, notes = noted(tmp_path)
    assert f"{tmp_path.name}/b" in names
    assert [
        note for note in notes if "COCO files in a pair of folders are left out" in note and str(folder / name) in note
    ]
    assert len(noted(tmp_path, layout="coco")[0]) == 1
    (tmp_path / "masks" / "b.png").unlink()
    names, notes = noted(tmp_path)
    assert [one.rsplit("/", 1)[-1] for one in names] == ["a"]
    assert not notes


COCO_NAMES = {
    "capital": ("Annotations.json", "{root}/a"),
    "suffix": ("annotations.JSON", "{root}/a"),
    "instances": ("Annotations/Instances_val.JSON", "val/a"),
    "tool": ("train/_Annotations.COCO.json", "train/a"),
}


@pytest.mark.parametrize(("file", "name"), COCO_NAMES.values(), ids=COCO_NAMES)
def test_coco_files_are_found_in_upper_and_lower_case(file, name, tmp_path):
    path = tmp_path / file
    put_coco(path.parent, path.name)
    pictures = tmp_path / ("val" if "nstances" in file else "Images" if "/" not in file else "train")
    pictures.mkdir(exist_ok=True)
    (path.parent / "a.jpg").rename(pictures / "a.jpg")
    (sample,) = find_masked_images(tmp_path)
    assert sample.name == name.format(root=tmp_path.name)
    assert sample.load()[1].any()


def put_coco(folder, file="annotations.json", **fields):
    """A COCO file with one picture and its square beside it."""
    put(folder, "a.jpg")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[5, 4, 15, 4, 15, 10, 5, 10]], **fields}
    images = [{"id": 1, "file_name": "a.jpg", "width": 24, "height": 16}]
    (folder / file).write_text(json.dumps({"images": images, "annotations": [annotation], "categories": []}))


APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xff\xfe"


@pytest.mark.parametrize(
    "hidden", ["._annotations.coco.json", "._instances_x.json", ".annotations.json", ".x.coco.json"]
)
def test_hidden_files_are_no_coco_files(hidden, tmp_path):
    put_coco(tmp_path / "set")
    (tmp_path / "set" / hidden).write_bytes(APPLE_DOUBLE)
    with pytest.warns(DataWarning, match="hidden and system files and folders are left out: 1"):
        samples = find_masked_images(tmp_path)
    assert [one.name for one in samples] == ["set/a"]


BROKEN_COCO = {
    "no_json": b"{",
    "binary": APPLE_DOUBLE,
    "deep": b"[" * 100_000,
    "lists": b'{"images": 1, "annotations": 2}',
    "no_pictures": b'{"images": [{"id": 1, "file_name": "x.jpg", "width": 4, "height": 4}], '
    b'"annotations": [{"id": 1, "image_id": 1, "segmentation": [[0, 0, 3, 0, 3, 3]]}]}',
    "empty": b'{"images": [], "annotations": []}',
}


@pytest.mark.parametrize("written", BROKEN_COCO.values(), ids=BROKEN_COCO)
def test_a_broken_coco_file_costs_itself_alone_unless_it_is_all_there_is(written, tmp_path):
    put_coco(tmp_path / "set")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "annotations.json").write_bytes(written)
    with pytest.warns(DataWarning, match=r"other/annotations\.json: .*: COCO file left out"):
        samples = find_masked_images(tmp_path)
    assert [one.name for one in samples] == ["set/a"]
    for data in (tmp_path / "other", tmp_path / "other" / "annotations.json"):
        with pytest.raises(ValueError, match=r"other/annotations\.json: .*expected"):
            find_masked_images(data)


def test_other_json_of_such_a_name_is_left_out_and_said(tmp_path):
    put_coco(tmp_path / "set")
    (tmp_path / "annotations.json").write_text('{"via": 1}')
    with pytest.warns(DataWarning, match="got other JSON: JSON file with the name of a COCO file left out"):
        samples = find_masked_images(tmp_path)
    assert [one.name for one in samples] == ["set/a"]


def test_a_link_to_a_coco_file_is_not_read_again(tmp_path):
    put_coco(tmp_path / "set", "v2.coco.json")
    (tmp_path / "set" / "a_latest.coco.json").symlink_to("v2.coco.json")
    with pytest.warns(DataWarning, match="links to COCO files that are used under another name are left out: 1"):
        samples = find_masked_images(tmp_path)
    assert [one.name for one in samples] == ["set/a"]


def test_a_picture_in_two_files_is_used_once(tmp_path):
    for part in ("train", "val"):
        put_coco(tmp_path / "images", "unused.json")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "images" / "unused.json").rename(tmp_path / "annotations" / f"instances_{part}.json")
    with pytest.warns(DataWarning, match="pictures that are used under another name, by a link or a second source"):
        samples = find_masked_images(tmp_path)
    assert [one.name for one in samples] == ["train/a"]


def test_crowds_are_said_or_used_in_a_tree(tmp_path):
    put_coco(tmp_path, iscrowd=1)
    with pytest.raises(ValueError, match="1 annotations marked iscrowd left out; --crowds use takes them as objects"):
        find_masked_images(tmp_path)
    assert len(find_masked_images(tmp_path, crowds="use")) == 1
    with pytest.raises(ValueError, match="crowds: expected one of skip, use, got 'yes'"):
        find_masked_images(tmp_path, crowds="yes")


def test_the_meaning_of_masks_is_the_sets_or_the_users(hqseg, tmp_path):
    own = tmp_path / "own"
    put(own / "images", "a.jpg", "b.jpg")
    put(own / "masks" / "deep", "mask:c.png")
    put(own / "masks", "mask:a.png", "mask:b.png")
    first, second, third = find_masked_images(own)
    assert first.masks is second.masks is third.masks
    assert {path.name for path in first.masks.paths} == {"a.png", "b.png", "c.png"}
    one_object = ("DIS5K", "ThinObject5K", "cascade_psp")
    for sample in find_masked_images(hqseg):
        if any(name in sample.name for name in one_object):
            assert sample.masks.meaning == "binary"
    for sample in find_masked_images(hqseg, masks="instances"):
        assert sample.masks.meaning == "instances"
        assert set(np.unique(sample.load()[1])) == {0, 255}
    with pytest.raises(ValueError, match="masks: expected one of auto, binary, instances, void, got 'ids'"):
        find_masked_images(hqseg, masks="ids")
