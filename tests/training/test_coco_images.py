"""COCO files: where their pictures are, and what their segmentations say."""

import json

import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.training.dataset import check_samples, find_masked_images
from stable_sam_cuda.training.layouts import find_samples

HEIGHT, WIDTH = 20, 30
SQUARE = [[2, 3, 12, 3, 12, 9, 2, 9]]  # columns 2 to 11, rows 3 to 8
RUNS = {"size": [HEIGHT, WIDTH], "counts": [0, 20, 580]}  # the first column
COMPRESSED = {"size": [HEIGHT, WIDTH], "counts": "0d0Tb0"}  # the same, as pycocotools packs it


def annotation(number, segmentation, image=1, **fields):
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": segmentation, "iscrowd": 0, **fields}


def write(path, annotations, names=("a.png",), **fields):
    images = [
        {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH, **fields}
        for number, name in enumerate(names, 1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return path


def put_pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 60)).save(folder / name)


@pytest.mark.parametrize(
    ("file", "pictures", "name"),
    [
        ("annotations/instances_val2017.json", "val2017", "val2017/a"),
        ("annotations/instances_val2017.json", "images/val2017", "val2017/a"),
        ("annotations.json", "images", "{root}/a"),
        ("train/_annotations.coco.json", "train", "train/a"),
        ("coco/annotations/instances_train2014.json", "coco/train2014", "coco/train2014/a"),
    ],
)
def test_pictures_are_found_where_coco_and_annotation_tools_put_them(file, pictures, name, tmp_path):
    write(tmp_path / file, [annotation(1, SQUARE)])
    put_pictures(tmp_path / pictures, "a.png")
    (sample,) = find_masked_images(tmp_path)
    assert sample.name == name.format(root=tmp_path.name)
    image, ids = sample.load()
    assert image.shape == (HEIGHT, WIDTH, 3)
    expected = np.zeros((HEIGHT, WIDTH))
    expected[3:9, 2:12] = 1
    assert (ids == expected).all()


def test_the_file_itself_can_be_named(tmp_path):
    path = write(tmp_path / "mine.json", [annotation(1, SQUARE)])
    put_pictures(tmp_path, "a.png")
    assert [sample.name for sample in find_samples(path)] == ["mine/a"]


@pytest.mark.parametrize("runs", [RUNS, COMPRESSED], ids=["plain", "compressed"])
def test_run_lengths(runs, tmp_path):
    path = write(tmp_path / "x.coco.json", [annotation(1, runs)])
    put_pictures(tmp_path, "a.png")
    _, ids = find_samples(path)[0].load()
    assert ids[:, 0].all()
    assert not ids[:, 1:].any()


def test_polygon_of_several_parts_and_the_smaller_of_two_overlapping_objects(tmp_path):
    parts = [[0, 0, 4, 0, 4, 4, 0, 4], [20, 10, 24, 10, 24, 14, 20, 14]]
    inner = [[4, 4, 6, 4, 6, 6, 4, 6]]
    put_pictures(tmp_path, "a.png")
    path = write(tmp_path / "x.coco.json", [annotation(7, inner), annotation(8, SQUARE), annotation(9, parts)])
    _, ids = find_samples(path)[0].load()
    assert (ids == 1).sum() == 4
    assert (ids == 2).sum() == 60 - 4 - 2
    assert (ids == 3).sum() == 32
    assert ids[12, 22] == 3


def test_crowds_and_pictures_without_objects_are_left_out(tmp_path):
    put_pictures(tmp_path, "a.png", "b.png", "c.png")
    crowd = annotation(2, RUNS, image=2, iscrowd=1)
    path = write(tmp_path / "x.coco.json", [annotation(1, SQUARE), crowd], ("a.png", "b.png", "c.png"))
    assert [sample.name for sample in find_samples(path)] == ["x.coco/a"]


def test_broken_entries_are_told_by_name(tmp_path):
    names = ("a.png", "b.png", "c.png", "d.png", "e.png")
    put_pictures(tmp_path, *names[:4])
    wrong_size = {"size": [5, 5], "counts": [0, 25]}
    segmentations = (SQUARE, [[1, 1, 2, 2]], None, wrong_size, SQUARE)
    annotations = [annotation(40 + image, one, image) for image, one in enumerate(segmentations, 1)]
    good, broken = check_samples(find_samples(write(tmp_path / "x.coco.json", annotations, names)))
    assert [sample.name for sample in good] == ["x.coco/a"]
    reasons = dict(broken)
    assert "annotation 42: segmentation: expected polygons of three or more" in reasons["x.coco/b"]
    assert "annotation 43: expected a segmentation, got none" in reasons["x.coco/c"]
    assert "annotation 44: segmentation: expected run lengths of size [20, 30]" in reasons["x.coco/d"]
    assert "e.png: expected a picture file" in reasons["x.coco/e"]


def test_picture_of_another_size_than_its_entry_is_broken(tmp_path):
    put_pictures(tmp_path, "a.png")
    path = write(tmp_path / "x.coco.json", [annotation(1, SQUARE)], height=21)
    (fault,) = check_samples(find_samples(path))[1]
    assert fault == ("x.coco/a", "picture has size (20, 30), its COCO entry (21, 30)")


def test_file_without_its_pictures_or_with_missing_fields_is_refused(tmp_path):
    path = write(tmp_path / "x.coco.json", [annotation(1, SQUARE)])
    with pytest.raises(ValueError, match=r"expected its pictures \(a.png, ...\) in one of"):
        find_samples(path)
    put_pictures(tmp_path, "a.png")
    content = json.loads(path.read_text())
    del content["images"][0]["height"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected every image and annotation to have 'height'"):
        find_samples(path)
