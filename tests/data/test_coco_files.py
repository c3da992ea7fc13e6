"""Faults of COCO files: each is named and costs the entry that has it alone."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.data.coco_images import CocoImage, find_coco_images
from stable_sam_cuda.data.dataset import check_samples, find_masked_images
from stable_sam_cuda.notes import DataWarning

HEIGHT, WIDTH = 20, 30
SQUARE = [[2, 3, 12, 3, 12, 9, 2, 9]]
OTHER = [[15, 10, 25, 10, 25, 18, 15, 18]]


def content(**changes):
    """Two pictures; the first has two annotations, the second one."""
    images = [{"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in (1, 2)]
    annotations = [
        {"id": 7, "image_id": 1, "category_id": 1, "segmentation": SQUARE, "iscrowd": 0},
        {"id": 8, "image_id": 1, "category_id": 1, "segmentation": OTHER, "iscrowd": 0},
        {"id": 9, "image_id": 2, "category_id": 1, "segmentation": SQUARE, "iscrowd": 0},
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}], **changes}


@pytest.fixture
def use(tmp_path):
    """Writes a COCO file with two pictures beside it; objects found by picture, what was noted, what was skipped."""
    for name in ("1.png", "2.png"):
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 60)).save(tmp_path / name)

    def found(coco, **options):
        path = tmp_path / "set.coco.json"
        path.write_bytes(coco if isinstance(coco, bytes) else json.dumps(coco).encode())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            good, broken = check_samples(find_masked_images(path, **options))
            # Loading again, as training does, says nothing again.
            objects = {one.name.split("/")[-1]: sorted(set(np.unique(one.load()[1])) - {0}) for one in good}
        notes = [str(one.message) for one in caught if issubclass(one.category, DataWarning)]
        assert len(notes) == len(set(notes))
        assert all(note.startswith(str(path)) and note.isprintable() for note in notes)
        return objects, notes, broken

    return found


BAD_SEGMENTATIONS = {
    "missing": None,
    "text": "polygon",
    "two_corners": [[1, 1, 2, 2]],
    "odd": [[1, 1, 5, 5, 9]],
    "nan": [[1, 1, 5, 5, float("nan"), 9]],
    "infinite": [[1, 1, 5, 5, 1e400, 9]],
    "nested": [[[[[1]]]]],
    "null": [[1, 1, None, 5, 9, 9]],
    "size": {"size": [5, 5], "counts": [0, 25]},
    "sum": {"size": [HEIGHT, WIDTH], "counts": [5]},
    "counts": {"size": [HEIGHT, WIDTH], "counts": "zzz"},
}


@pytest.mark.parametrize("segmentation", BAD_SEGMENTATIONS.values(), ids=BAD_SEGMENTATIONS)
def test_a_broken_segmentation_costs_its_annotation_alone(segmentation, use):
    coco = content()
    coco["annotations"][0]["segmentation"] = segmentation
    objects, notes, broken = use(coco)
    assert objects == {"1": [2], "2": [1]}
    assert not broken
    (note,) = notes
    assert "picture set.coco/1: annotation 7" in note
    assert "annotation left out" in note
    assert "expected" in note


@pytest.mark.parametrize("segmentation", BAD_SEGMENTATIONS.values(), ids=BAD_SEGMENTATIONS)
def test_a_picture_whose_annotations_are_all_broken_is_skipped_with_the_first_reason(segmentation, use):
    coco = content()
    for annotation in coco["annotations"][:2]:
        annotation["segmentation"] = segmentation
    objects, notes, broken = use(coco)
    assert objects == {"2": [1]}
    ((name, reason),) = broken
    assert name == "set.coco/1"
    assert "set.coco.json: annotation 7: " in reason
    (note,) = notes
    assert "annotation 8" in note


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 99}, "image_id of a listed picture"),
        ({"image_id": [1]}, "image_id of a listed picture"),
        ({"image_id": {"id": 1}}, "image_id of a listed picture"),
        ({"image_id": None}, "image_id of a listed picture"),
        ({"image_id": True}, "image_id of a listed picture"),
        ({"image_id": "1"}, "image_id of a listed picture"),
        ({"iscrowd": "0"}, "iscrowd 0 or 1"),
        ({"iscrowd": 2}, "iscrowd 0 or 1"),
        ({"iscrowd": [0]}, "iscrowd 0 or 1"),
        ({"iscrowd": float("nan")}, "iscrowd 0 or 1"),
    ],
    ids=str,
)
def test_a_broken_annotation_costs_itself_alone(change, reason, use):
    coco = content()
    coco["annotations"][0] |= change
    objects, notes, broken = use(coco)
    assert objects == {"1": [1], "2": [1]}
    assert not broken
    (note,) = notes
    assert "annotation 7" in note
    assert reason in note


@pytest.mark.parametrize("odd", [None, 5, "text", [1, 2], []], ids=repr)
def test_entries_of_other_kinds_are_left_out_by_place(odd, use):
    coco = content()
    coco["annotations"].insert(0, odd)
    coco["images"].insert(0, odd)
    objects, notes, broken = use(coco)
    assert objects == {"1": [1, 2], "2": [1]}
    assert not broken
    assert ["images[0]" in notes[0], "annotations[0]" in notes[1], len(notes)] == [True, True, 2]


@pytest.mark.parametrize(
    "number", [None, [3], {"a": 1}, "seven", 1.5, float("nan"), "\ud800", "a\nb"], ids=lambda value: ascii(value)
)
def test_odd_ids_of_annotations_only_name_them(number, use):
    coco = content()
    coco["annotations"][0] |= {"id": number, "segmentation": None}
    objects, notes, broken = use(coco)
    assert objects == {"1": [2], "2": [1]}
    assert not broken
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": None}, "a width in whole pixels"),
        ({"width": 0}, "a width in whole pixels"),
        ({"height": -20}, "a height in whole pixels"),
        ({"height": "20"}, "a height in whole pixels"),
        ({"height": 20.5}, "a height in whole pixels"),
        ({"height": True}, "a height in whole pixels"),
        ({"height": float("nan")}, "a height in whole pixels"),
        ({"height": [20]}, "a height in whole pixels"),
        ({"height": 10**12}, "at most 100,000,000 pixels"),
        ({"height": 1e300}, "at most 100,000,000 pixels"),
        ({"file_name": None}, "a file_name"),
        ({"file_name": 5}, "a file_name"),
        ({"file_name": ""}, "a file_name"),
        ({"file_name": ".."}, "a file_name"),
        ({"file_name": "/"}, "a file_name"),
        ({"file_name": "a\0b.png"}, "one that no file can have"),
        ({"file_name": "a" * 300 + ".png"}, "one that no file can have"),
        ({"file_name": "a/" * 3000 + "b.png"}, "one that no file can have"),
        ({"file_name": "\ud800.png"}, "one that no file can have"),
        ({"file_name": "https://example.org/1.png"}, "got an address"),
        ({"id": None}, "an id that is a number or text"),
        ({"id": [1]}, "an id that is a number or text"),
        ({"id": {"a": 1}}, "an id that is a number or text"),
        ({"id": float("nan")}, "an id that is a number or text"),
        ({"id": True}, "an id that is a number or text"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_broken_picture_entry_costs_that_picture_alone(change, reason, use):
    coco = content()
    coco["images"][0] |= change
    if "id" in change:  # an annotation that names no picture would be a fault of its own
        coco["annotations"] = coco["annotations"][2:]
    objects, notes, broken = use(coco)
    assert objects == {"2": [1]}
    assert not broken
    (note,) = notes
    assert "picture left out" in note
    assert reason in note


@pytest.mark.parametrize("missing", ["id", "file_name", "height", "width"])
def test_missing_fields_of_a_picture_cost_it_alone(missing, use):
    coco = content()
    del coco["images"][0][missing]
    assert use(coco)[0] == {"2": [1]}


def test_whole_numbers_may_be_written_as_fractions_and_ids_as_text(use):
    coco = content()
    coco["images"][0] |= {"height": 20.0, "width": 30.0, "id": "one"}
    for annotation in coco["annotations"][:2]:
        annotation |= {"image_id": "one", "iscrowd": False}
    assert use(coco)[0] == {"1": [1, 2], "2": [1]}


def test_ids_that_several_pictures_have_belong_to_none(use):
    coco = content()
    coco["images"].append({**coco["images"][0], "file_name": "3.png"})
    objects, notes, _ = use(coco)
    assert objects == {"2": [1]}
    assert len(notes) == 2
    assert all("expected each id once" in note for note in notes)


def test_entries_that_are_there_again_are_taken_once(use):
    coco = content()
    coco["images"].append(dict(coco["images"][0]))
    coco["annotations"].append(dict(coco["annotations"][0]))
    coco["images"].append({**coco["images"][0], "id": 5})
    coco["annotations"].append({**coco["annotations"][0], "id": 70, "image_id": 5})
    objects, notes, _ = use(coco)
    assert objects == {"1": [1, 2], "2": [1]}
    again = "annotation left out: expected each annotation once, got one again"
    assert sorted(note.split(".json: ")[1] for note in notes) == [
        f"picture 1.png: annotation 7 (annotations[3]): {again}",
        f"picture 1.png: annotation 70: {again}",
        "picture 1.png: picture left out: expected each picture once, got an entry again",
        "picture 1.png: the picture is listed several times; its objects are joined",
    ]


@pytest.mark.parametrize("again", ["1.png", "./1.png", "x/../1.png", "{folder}/1.png", "link.png"])
def test_objects_of_entries_of_one_picture_are_joined(again, use, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "link.png").symlink_to("1.png")
    coco = content()
    coco["images"].append({**coco["images"][0], "id": 5, "file_name": again.format(folder=tmp_path)})
    third = [[0, 0, 3, 0, 3, 3, 0, 3]]
    coco["annotations"].append({**coco["annotations"][0], "id": 70, "image_id": 5, "segmentation": third})
    objects, notes, broken = use(coco)
    assert objects == {"1": [1, 2, 3], "2": [1]}
    assert not broken
    assert [note.split(": ")[-1] for note in notes] == ["the picture is listed several times; its objects are joined"]


def test_objects_of_an_entry_of_another_size_are_counted_as_lost(use):
    coco = content()
    coco["images"].append({**coco["images"][0], "id": 5, "file_name": "./1.png", "width": 99})
    coco["annotations"] += [{**coco["annotations"][place], "id": 70 + place, "image_id": 5} for place in (0, 1)]
    objects, notes, _ = use(coco)
    assert objects == {"1": [1, 2], "2": [1]}
    assert "picture ./1.png (objects lost: 2): picture left out: expected each picture once" in notes[0]


def test_an_entry_again_that_differs_in_what_does_not_matter_is_taken_once(use):
    coco = content()
    coco["images"].append({**coco["images"][0], "file_name": "./1.png", "license": 3})
    assert use(coco)[0] == {"1": [1, 2], "2": [1]}


@pytest.mark.parametrize("name", ["images", "annotations", "info"])
def test_a_name_twice_in_the_outermost_object_is_refused(name, use):
    written = json.dumps({**content(), "info": {}}).replace(f'"{name}":', f'"{name}": [], "{name}":', 1)
    with pytest.raises(ValueError, match=rf"set\.coco\.json: expected each name once, got '{name}' twice"):
        use(written.encode())


def test_a_name_twice_in_an_entry_is_said(use):
    written = json.dumps(content()).replace('"id": 7,', '"id": 7, "iscrowd": 1,', 1)
    objects, notes, _ = use(written.encode())
    assert objects == {"1": [1, 2], "2": [1]}
    assert "'iscrowd': a name is given twice in an object of the JSON file; the last one counts" in notes[0]


def test_pictures_without_annotations_and_categories_are_no_fault_but_counted(use):
    coco = content(annotations=content()["annotations"][2:])
    del coco["categories"]
    objects, notes, broken = use(coco)
    assert objects == {"2": [1]}
    assert not broken
    assert [note.split(": ")[-1] for note in notes] == ["1 pictures without an annotation left out"]


RUNS = {"size": [HEIGHT, WIDTH], "counts": [0, 20, 580]}


def test_crowds_are_counted_and_said_or_used(use):
    coco = content()
    coco["annotations"][1] |= {"iscrowd": 1, "segmentation": RUNS}
    coco["annotations"][2] |= {"iscrowd": 1, "segmentation": RUNS}
    objects, notes, _ = use(coco)
    assert objects == {"1": [1]}
    assert [note.split(".json: ")[1] for note in notes] == [
        "2 annotations marked iscrowd left out; --crowds use takes them as objects"
    ]
    objects, notes, _ = use(coco, crowds="use")
    assert objects == {"1": [1, 2], "2": [1]}
    assert not notes
    with pytest.raises(ValueError, match="crowds: expected one of skip, use, got 'all'"):
        use(coco, crowds="all")


def test_a_file_of_crowds_alone_says_so(use):
    coco = content()
    for annotation in coco["annotations"]:
        annotation |= {"iscrowd": 1, "segmentation": RUNS if annotation["id"] == 7 else annotation["segmentation"]}
    with pytest.raises(
        ValueError, match="found no picture with a mask; 3 annotations marked iscrowd left out; --crowds"
    ):
        use(coco)
    assert use(coco, crowds="use")[0] == {"1": [1, 2], "2": [1]}


NO_COCO_FILES = {
    "empty": b"",
    "text": b"no json",
    "half": b'{"images": [',
    "not_utf8": b'{"images": [], "annotations": ["\xff\xfe"]}',
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "deep_inside": b'{"images": [], "annotations": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long_number": b'{"images": [], "annotations": [' + b"9" * 5000 + b"]}",
    "list": b"[]",
    "null": b"null",
    "number": b"NaN",
    "other": b'{"shapes": []}',
    "images_only": b'{"images": []}',
    "dictionaries": b'{"images": {}, "annotations": {}}',
    "nulls": b'{"images": null, "annotations": null}',
    "nothing_in_it": b'{"images": [], "annotations": []}',
}


@pytest.mark.parametrize("written", NO_COCO_FILES.values(), ids=NO_COCO_FILES)
def test_a_file_that_is_none_is_refused_in_one_line(written, use):
    with pytest.raises(ValueError, match=r"set\.coco\.json: .*expected") as caught:
        use(written)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_byte_order_marks_are_taken(encoding, use):
    assert use(json.dumps(content()).encode(encoding))[0] == {"1": [1, 2], "2": [1]}


@pytest.mark.parametrize("depth", [100, 700, 800, 850, 900, 950, 990])
def test_deeply_nested_parts_cost_what_has_them_alone_or_the_file(depth, use):
    nested = b"[" * depth + b"]" * depth
    for field, twice in (("segmentation", False), ("segmentation", True), ("extra", True)):
        coco = content()
        coco["annotations"][0][field] = "@"
        coco["annotations"] += [dict(coco["annotations"][0])] * twice
        coco["images"][0]["extra"] = "@"
        coco["images"] += [dict(coco["images"][0])] * twice
        try:
            objects, _, broken = use(json.dumps(coco).encode().replace(b'"@"', nested))
        except ValueError as error:
            assert "nested too deeply" in str(error)
        else:
            assert objects["2"] == [1]
            assert not broken


def test_digests_of_deeply_nested_parts_are_taken(tmp_path):
    deep = []
    for _ in range(5000):
        deep = [deep]
    sample = CocoImage("x/a", tmp_path / "1.png", 4, 4, ({"id": 1, "image_id": 1, "segmentation": deep},))
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    assert len(sample.digest()) == 64


def test_file_names_with_backslashes_and_steps_up_are_found_and_named_without(tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    for path in ("set/train/1.png", "2.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / path)
    coco = content()
    coco["images"][0]["file_name"], coco["images"][1]["file_name"] = "train\\1.png", "../2.png"
    (tmp_path / "set" / "x.json").write_text(json.dumps(coco))
    good, broken = check_samples(find_coco_images(tmp_path / "set" / "x.json", "x"))
    assert [one.name for one in good] == ["x/train/1", "x/2"]
    assert not broken


def test_objects_that_no_pixel_is_seen_of_are_said(use):
    coco = content()
    coco["annotations"][1]["segmentation"] = [[900, 900, 950, 900, 950, 950]]
    coco["annotations"].append({**coco["annotations"][2], "id": 10})
    objects, notes, broken = use(coco)
    assert objects == {"1": [1], "2": [2]}
    assert not broken
    assert sorted(note.split(": ", 1)[1] for note in notes) == [
        "picture set.coco/1: annotation 8: object left out: no pixel is in its picture",
        "picture set.coco/2: annotation 9: object left out: others cover it",
    ]


def test_an_absolute_file_name_is_taken_and_a_missing_picture_costs_itself_alone(use, tmp_path):
    coco = content()
    coco["images"][0]["file_name"], coco["images"][1]["file_name"] = str(tmp_path / "1.png"), "3.png"
    objects, _, broken = use(coco)
    assert list(objects.values()) == [[1, 2]]
    assert "3.png: expected a picture file" in broken[0][1]
