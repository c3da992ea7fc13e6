"""COCO files: where their pictures are, and what their segmentations say."""

import json
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco_mask

from stable_sam_cuda.data import picture
from stable_sam_cuda.data.coco_images import decode_segmentation
from stable_sam_cuda.data.dataset import check_samples, find_masked_images
from stable_sam_cuda.data.layouts import find_samples
from stable_sam_cuda.notes import DataWarning

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


def test_a_link_to_the_file_finds_the_pictures_beside_the_file(tmp_path):
    write(tmp_path / "set" / "mine.json", [annotation(1, SQUARE)])
    put_pictures(tmp_path / "set", "a.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.json").symlink_to(tmp_path / "set" / "mine.json")
    assert find_samples(tmp_path / "elsewhere" / "link.json")[0].load()[1].any()


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
    with pytest.raises(ValueError, match=r"the first fault, picture a\.png: picture left out: expected a height"):
        find_samples(path)


def turned(folder, name, orientation, size=(WIDTH, HEIGHT)):
    """A picture of this size as it is stored, with an EXIF tag that turns it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    picture.save(folder / name, exif=exif)
    return picture


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("segmentation", [SQUARE, RUNS, COMPRESSED], ids=["polygon", "runs", "packed"])
def test_annotations_of_the_picture_as_it_is_stored_are_turned_with_it(orientation, segmentation, tmp_path):
    stored = np.asarray(turned(tmp_path, "a.png", orientation))
    path = write(tmp_path / "x.coco.json", [annotation(1, segmentation)])
    with pytest.warns(DataWarning, match="an EXIF tag turns the picture; its annotations are those of the stored one"):
        image, ids = find_samples(path)[0].load()
    assert image.shape[:2] == ids.shape == (WIDTH, HEIGHT)
    inside = decode_segmentation(segmentation, HEIGHT, WIDTH)
    # The turned object has the same pixels of the picture.
    assert sorted(map(tuple, image[ids == 1])) == sorted(map(tuple, stored[inside]))


@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_annotations_of_the_picture_as_it_is_seen_are_not_turned(orientation, tmp_path):
    seen = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
    turned(tmp_path, "a.png", orientation, seen)
    path = write(tmp_path / "x.coco.json", [annotation(1, SQUARE)])
    (sample,) = find_samples(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, ids = sample.load()
        sample.load()
    assert (ids == decode_segmentation(SQUARE, HEIGHT, WIDTH)).all()
    # Where both are of one size, nobody can know: it is said, once.
    reasons = ["an EXIF tag turns the picture; its annotations are taken as those of the turned one"]
    assert [one.message.reason for one in caught] == (reasons if orientation < 5 else [])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("entry_as", ["seen", "stored"])
def test_run_lengths_in_the_other_frame_than_their_entry_are_turned_to_it(entry_as, form, orientation, tmp_path):
    stored = np.asarray(turned(tmp_path, "a.png", orientation))
    whole = np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.3  # the object on the stored picture
    seen = picture.turn(whole, orientation)
    given, size = (whole, seen.shape) if entry_as == "seen" else (seen, whole.shape)
    steps = np.flatnonzero(np.diff(given.ravel("F"), prepend=False, append=False)).tolist()
    runs = {"size": list(given.shape), "counts": np.diff([0, *steps, given.size]).tolist()}
    if form == "packed":
        runs = pycoco_mask.frPyObjects(runs, *given.shape)
        runs["counts"] = runs["counts"].decode()
    entry = {"height": size[0], "width": size[1]}
    path = write(tmp_path / "x.coco.json", [annotation(1, runs), annotation(2, SQUARE)], **entry)
    (sample,) = find_samples(path)
    with pytest.warns(DataWarning, match="run lengths have the size of the picture before or after the turn"):
        image, ids = sample.load()
    assert ids.shape == seen.shape == image.shape[:2]
    # A polygon beside it stays in the frame of the entry.
    square = decode_segmentation(SQUARE, *size)
    square = square if entry_as == "seen" else picture.turn(square, orientation)
    assert ((ids == 1) == (seen & ~square)).all()
    assert sorted(map(tuple, image[ids == 1])) == sorted(map(tuple, stored[whole & ~on_stored(square, orientation)]))


def on_stored(square, orientation):
    """The square on the stored picture: the turn that undoes the picture's."""
    return picture.turn(square, {6: 8, 8: 6}.get(orientation, orientation))


def test_swapped_run_lengths_without_a_turn_are_refused(tmp_path):
    put_pictures(tmp_path, "a.png")
    runs = {"size": [WIDTH, HEIGHT], "counts": [0, 20, 580]}
    (fault,) = check_samples(find_samples(write(tmp_path / "x.coco.json", [annotation(1, runs)])))[1]
    assert "got another, with width and height swapped" in fault[1]


def test_another_size_of_a_turned_picture_tells_of_the_turn(tmp_path):
    turned(tmp_path, "a.png", 6, (WIDTH + 1, HEIGHT))
    path = write(tmp_path / "x.coco.json", [annotation(1, SQUARE)])
    (fault,) = check_samples(find_samples(path))[1]
    assert fault[1] == (
        "picture has size (31, 20), its COCO entry (20, 30); stored as (20, 31), turned by EXIF orientation 6"
    )


def test_digests_follow_what_decides_on_picture_and_objects(tmp_path):
    def digests(name="a.png", **fields):
        entry = {**annotation(1, SQUARE), **fields}
        (sample,) = find_samples(write(tmp_path / "x.coco.json", [entry], names=(name,)), crowds="use")
        return sample.picture_digest(), sample.digest()

    put_pictures(tmp_path, "a.png", "b.png")
    turned(tmp_path, "c.png", 1)
    first = digests()
    assert first == digests() == digests(category_id=5, id=9, area=3.0) == digests("b.png")
    for fields in ({"segmentation": RUNS}, {"segmentation": [[2, 3, 12, 3, 12, 9, 2, 9.5]]}, {"iscrowd": 1}):
        changed = digests(**fields)
        assert changed[0] == first[0]
        assert changed[1] != first[1]
    assert digests("c.png")[0] != first[0]
    assert digests("c.png")[1] != first[1]


def test_samples_can_be_sent_to_another_process_and_say_their_faults_once(tmp_path):
    put_pictures(tmp_path, "a.png")
    (sample,) = find_samples(write(tmp_path / "x.coco.json", [annotation(1, SQUARE), annotation(2, None)]))
    with pytest.warns(DataWarning, match=r"x\.coco\.json: picture x\.coco/a: annotation 2: annotation left out"):
        _, ids = sample.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pickle.loads(pickle.dumps(sample)).load()[1] == ids).all()


def test_two_pictures_of_one_stem_have_two_names(tmp_path):
    put_pictures(tmp_path, "a.png", "a.bmp")
    annotations = [annotation(1, SQUARE), annotation(2, SQUARE, image=2)]
    path = write(tmp_path / "x.coco.json", annotations, names=("a.png", "a.bmp"))
    assert [one.name for one in find_samples(path)] == ["x.coco/a", "x.coco/a.bmp"]
