"""Average precision on a COCO file made by hand, against pycocotools and by cases whose answer is known."""

import contextlib
import io
import itertools
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO as PyCoco  # noqa: N811 (the name of the other library's)
from pycocotools.cocoeval import COCOeval

from stable_sam_cuda.data import picture
from stable_sam_cuda.data.coco_images import find_coco_images
from stable_sam_cuda.data.prompts import box_iou
from stable_sam_cuda.data.samples import MaskedImage
from stable_sam_cuda.evaluation.coco import average_precision, check_precision, precision_by_kind, segment_boxes
from stable_sam_cuda.notes import DataWarning

HEIGHT, WIDTH = 200, 260
SQUARES = {  # (image, category): x, y, width, height
    (1, 1): [(20, 20, 60, 60), (120, 30, 80, 40)],
    (1, 7): [(100, 100, 100, 95)],
    (2, 1): [(0, 0, 50, 50), (210, 150, 50, 50), (80, 80, 20, 20)],
}


def polygon(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def run_lengths(mask):
    return pycoco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def rectangle(x, y, width, height):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[max(0, y) : y + height, max(0, x) : x + width] = True
    return mask


@pytest.fixture
def coco_file(tmp_path):
    annotations = [
        {"image_id": image, "category_id": category, "bbox": list(box), "segmentation": polygon(*box), "iscrowd": 0}
        for (image, category), boxes in SQUARES.items()
        for box in boxes
    ]
    crowd = run_lengths(rectangle(140, 10, 100, 60))
    crowd["counts"] = crowd["counts"].decode()
    annotations.append({"image_id": 2, "category_id": 1, "bbox": [140, 10, 100, 60], "segmentation": crowd})
    annotations[-1]["iscrowd"] = 1
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    images = [{"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in (1, 2)]
    for image in images:
        Image.new("RGB", (WIDTH, HEIGHT), (80, 90, 100)).save(tmp_path / image["file_name"])
    categories = [{"id": 1, "name": "one"}, {"id": 7, "name": "seven"}]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture
def images(coco_file):
    return find_coco_images(coco_file, "tiny")


def detections(images, change):
    """One result an object: the mask that ``change`` makes of x, y, width, height, and its score."""
    results = []
    for image in images:
        for number, annotation in enumerate(image.annotations):
            mask, score = change(*annotation["bbox"], number)
            found = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
            results.append({**found, "segmentation": run_lengths(mask), "score": score})
    return results


def written(path, change):
    """The file with its annotations changed."""
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        change(annotation)
    path.write_text(json.dumps(content))
    return find_coco_images(path, "tiny")


def by_pycocotools(path, results):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = PyCoco(str(path))
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value >= 0 else None for value in evaluation.stats[:6]]


def test_perfect_masks_have_100_percent(images):
    found = average_precision(images, detections(images, lambda *box: (rectangle(*box[:4]), 0.5)))
    for values in found.values():
        assert values == pytest.approx(dict.fromkeys(values, 100.0))


def test_empty_masks_and_no_masks_have_none(images):
    empty = detections(images, lambda *box: (rectangle(0, 0, 0, 0), 0.5))
    for results in (empty, []):
        assert all(value == 0 for values in average_precision(images, results).values() for value in values.values())


def test_shifted_masks_have_less_and_the_farther_the_less(images):
    precisions = []
    for shift in (0, 4, 8, 60):
        results = detections(images, lambda x, y, *rest, by=shift: (rectangle(x + by, y, *rest[:2]), 0.5))
        precisions.append(average_precision(images, results)["score_1"]["ap"])
    assert precisions[0] == pytest.approx(100)
    assert all(one > other for one, other in itertools.pairwise(precisions))
    assert precisions[-1] == 0


def test_agrees_with_pycocotools_whatever_the_masks_and_scores(coco_file, images):
    rng = np.random.default_rng(0)

    def change(x, y, width, height, number):
        dx, dy, dw, dh = rng.integers(-12, 13, 4)
        box = (x + dx, y + dy, max(1, width + dw), max(1, height + dh))
        return rectangle(*(int(value) for value in box)), float(rng.random())

    for _ in range(20):
        results = detections(images, change)
        found = average_precision(images, results)
        assert list(found["predicted_iou"].values()) == pytest.approx(by_pycocotools(coco_file, results))
        equal = [{**result, "score": 1.0} for result in results]
        assert list(found["score_1"].values()) == pytest.approx(by_pycocotools(coco_file, equal))


def test_a_mask_on_a_crowd_counts_neither_for_nor_against(images):
    results = detections(images, lambda *box: (rectangle(*box[:4]), 0.5))
    on_crowd = {"image_id": 2, "category_id": 1, "segmentation": run_lengths(rectangle(150, 20, 80, 40)), "score": 0.9}
    on_nothing = {**on_crowd, "segmentation": run_lengths(rectangle(20, 120, 40, 40))}
    assert average_precision(images, [*results, on_crowd])["predicted_iou"]["ap"] == pytest.approx(100)
    assert average_precision(images, [*results, on_nothing])["predicted_iou"]["ap"] < 99


def test_scores_decide_between_two_masks_of_a_category(images):
    """A wrong mask that is sure of itself costs more than one that is not."""

    def change(sure):
        return lambda x, y, width, height, number: (
            (rectangle(200, 0, 5, 5), sure) if number == 1 else (rectangle(x, y, width, height), 0.5)
        )

    wrong_first, wrong_last = (
        average_precision(images, detections(images, change(sure)))["predicted_iou"]["ap"] for sure in (0.9, 0.1)
    )
    assert wrong_first < wrong_last < 100


class FillingPredictor:
    """Answers each box with the filled box; remembers the boxes."""

    device = torch.device("cpu")
    transform = SimpleNamespace(apply_boxes_torch=lambda boxes, size: boxes)

    def __init__(self):
        self.boxes = []

    def set_image(self, image):
        self.size = image.shape[:2]

    def predict_torch(self, points, labels, boxes, multimask_output):
        assert points is None and labels is None and not multimask_output
        self.boxes.append(boxes)
        rows, columns = torch.arange(self.size[0]) + 0.5, torch.arange(self.size[1]) + 0.5
        x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
        masks = (columns > x0) & (columns < x1) & (rows[:, None] > y0) & (rows[:, None] < y1)
        return masks[:, None], torch.full((len(boxes), 1), 0.7), None


def test_true_boxes_are_coco_boxes_and_the_predicted_iou_is_the_score(images):
    predictor = FillingPredictor()
    results = segment_boxes(predictor, images)
    assert average_precision(images, results)["predicted_iou"]["ap"] == pytest.approx(100)
    assert [result["score"] for result in results] == pytest.approx([0.7] * 6)
    assert [result["category_id"] for result in results] == [1, 1, 7, 1, 1, 1]
    assert predictor.boxes[0].tolist() == [[20, 20, 80, 80], [120, 30, 200, 70], [100, 100, 200, 195]]


@pytest.mark.parametrize(("band", "passing"), [((0.5, 0.6), (1, 2)), ((0.6, 0.7), (3, 4))], ids=str)
def test_boxes_of_a_band_pass_the_thresholds_below_it(band, passing, images):
    """A model that fills its box passes 0.50 (and 0.55, 0.60, 0.65) of the ten thresholds, and none above the band."""
    predictor = FillingPredictor()
    results = segment_boxes(predictor, images, band=band, seed=3)
    truth = torch.tensor([annotation["bbox"] for image in images for annotation in image.annotations]).float()
    truth[:, 2:] += truth[:, :2]
    overlap = box_iou(torch.cat(predictor.boxes), truth)
    assert band[0] <= overlap.min()
    assert overlap.max() <= band[1]
    precision = average_precision(images, results)["score_1"]
    assert 10 * (passing[0] - 1) < precision["ap"] <= 10 * passing[1]
    assert precision["ap75"] == 0


def test_boxes_follow_from_the_seed_alone(images):
    def boxes(order, seed):
        predictor = FillingPredictor()
        segment_boxes(predictor, order, band=(0.5, 0.6), seed=seed)
        return predictor.boxes

    assert all(map(torch.equal, boxes(images, 1), boxes(images[::-1], 1)[::-1]))
    assert not any(map(torch.equal, boxes(images, 1), boxes(images, 2)))


def test_kinds_with_boxes_are_judged_and_pictures_without_a_coco_file_refused(images, tmp_path):
    precisions = precision_by_kind(FillingPredictor(), images, ["1_point", "gt_box", "box_60_70"])
    assert list(precisions) == ["gt_box", "box_60_70"]
    assert precisions["gt_box"]["score_1"]["ap"] == pytest.approx(100)
    assert 20 < precisions["box_60_70"]["predicted_iou"]["ap"] <= 40
    other = MaskedImage("set/a", tmp_path / "a.png", tmp_path / "a.png")
    with pytest.raises(ValueError, match="data: expected pictures of a COCO file, got 1 of 3 without one"):
        precision_by_kind(FillingPredictor(), [*images, other], ["gt_box"])


def test_statistics_of_no_object_are_none_which_is_json(coco_file):
    images = written(coco_file, lambda annotation: annotation.update(area=20_000))
    found = average_precision(images, detections(images, lambda *box: (rectangle(*box[:4]), 0.5)))
    for values in found.values():
        assert {name: values[name] for name in ("ap_small", "ap_medium")} == {"ap_small": None, "ap_medium": None}
        assert values["ap_large"] == pytest.approx(100)
    json.dumps(found, allow_nan=False)


BAD_BOXES = {
    "none": None,
    "three": [1, 2, 3],
    "text": "1 2 3 4",
    "texts": ["1", "2", "3", "4"],
    "nan": [1, 2, float("nan"), 4],
    "infinite": [1, 2, 3, 1e400],
    "far": [1, 2, 1e300, 4],
    "negative": [10, 10, -5, 4],
    "boolean": [True, 2, 3, 4],
    "nested": [[1], 2, 3, 4],
    "fractions": [0.31, 0.4, 0.08, 0.1],
    "dictionary": {"x": 1},
}


@pytest.mark.parametrize("box", BAD_BOXES.values(), ids=BAD_BOXES)
def test_a_bad_box_is_named_and_the_box_around_the_mask_prompted(box, coco_file):
    images = written(coco_file, lambda one: one.update(bbox=box) if one["id"] == 6 else None)
    predictor = FillingPredictor()
    with pytest.warns(
        DataWarning, match=r"annotations\.json: picture tiny/2: annotation 6 .*: expected a bbox of four"
    ):
        precision = precision_by_kind(predictor, images, ["gt_box"])
    assert predictor.boxes[1].tolist() == [[0, 0, 50, 50], [210, 150, 260, 200], [80, 80, 100, 100]]
    assert precision["gt_box"]["score_1"]["ap"] == pytest.approx(100)


def test_an_object_with_neither_box_nor_pixel_is_left_out(coco_file):
    far = [[900, 900, 950, 900, 950, 950]]
    images = written(coco_file, lambda one: one.update(bbox=None, segmentation=far) if one["id"] == 6 else None)
    with pytest.warns(DataWarning, match="annotation 6 .*: annotation left out of the average precision"):
        precision = precision_by_kind(FillingPredictor(), images, ["gt_box"])
    assert precision["gt_box"]["score_1"]["ap"] == pytest.approx(100)


@pytest.mark.parametrize("category", [None, [1], {"a": 1}, True, 1.5], ids=repr)
def test_a_bad_category_is_named_at_the_start_and_costs_its_annotation_alone(category, coco_file):
    for number in (6, 7):  # an object, a crowd
        images = written(coco_file, lambda one, at=number: one.update(category_id=category if one["id"] == at else 1))
        with pytest.warns(DataWarning, match=f"tiny/2: annotation {number} .*: annotation left out of the average"):
            check_precision(images, ["gt_box"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results = segment_boxes(FillingPredictor(), images)
            assert average_precision(images, results)["score_1"]["ap"] == pytest.approx(100)
        assert len(results) == (5 if number == 6 else 6)


def test_a_picture_without_a_category_is_passed_over_and_a_file_without_one_refused(coco_file):
    images = written(coco_file, lambda one: one.update(category_id=None) if one["image_id"] == 2 else None)
    heard = []
    with pytest.warns(DataWarning, match="expected a category_id"):
        precision = precision_by_kind(FillingPredictor(), images, ["gt_box"], progress=heard.append)
    assert precision["gt_box"]["score_1"]["ap"] == pytest.approx(100)
    assert heard == images
    images = written(coco_file, lambda one: one.pop("category_id"))
    with pytest.raises(ValueError, match="data: expected annotations with a category_id, got none"):
        check_precision(images, ["gt_box"])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_run_lengths_in_the_other_frame_are_prompted_around_their_mask(orientation, coco_file):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("1.png", "2.png"):
        with Image.open(coco_file.parent / name) as one:
            one.copy().save(coco_file.parent / name, exif=exif)

    def turn(annotation):
        if not annotation["iscrowd"]:
            mask = picture.turn(rectangle(*annotation["bbox"]), orientation)
            annotation["segmentation"] = run_lengths(mask)
            annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"].decode()

    images = written(coco_file, turn)
    with pytest.warns(DataWarning, match="the box around the mask is prompted, not the bbox"):
        precision = precision_by_kind(FillingPredictor(), images, ["gt_box"])
    assert precision["gt_box"]["score_1"]["ap"] == pytest.approx(100)


def test_what_cannot_be_judged_is_known_at_the_start(images, tmp_path):
    assert check_precision(images, ["1_point", "gt_box"]) == images
    for kinds in (["1_point", "noisy_box"], []):
        with pytest.raises(ValueError, match="prompts: expected one or more of gt_box, box_50_60, box_60_70, got"):
            check_precision(images, kinds)
    with pytest.raises(ValueError, match="expected pictures of one COCO file, got 2 pictures of the id 1"):
        check_precision([*images, images[0]], ["gt_box"])
    other = MaskedImage("set/a", tmp_path / "a.png", tmp_path / "a.png")
    with pytest.raises(ValueError, match="data: expected pictures of a COCO file, got 1 of 1 without one"):
        check_precision([other], ["gt_box"])


def test_annotations_that_cannot_be_decoded_are_neither_prompted_nor_judged(coco_file):
    def spoil(annotation):
        if annotation["id"] in (2, 7):  # an object, a crowd
            annotation["segmentation"] = [[1, 2, 3, 4]]

    images = written(coco_file, spoil)
    with pytest.warns(DataWarning, match="left out: segmentation: expected polygons"):
        results = segment_boxes(FillingPredictor(), images)
        found = average_precision(images, results)
    assert len(results) == 5
    assert found["score_1"]["ap"] == pytest.approx(100)


def test_far_corners_and_ids_as_text_are_judged(coco_file):
    def change(annotation):
        if annotation["id"] == 5:  # touches the right and the lower edge: its corners may as well lie outside
            annotation["segmentation"] = [[210, 150, 1e9, 150, 1e9, 1e9, 210, 1e9]]
        annotation["category_id"] = f"category {annotation['category_id']}"

    images = written(coco_file, change)
    results = segment_boxes(FillingPredictor(), images)
    assert average_precision(images, results)["predicted_iou"]["ap"] == pytest.approx(100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_that_exif_turns_are_judged_in_one_frame(orientation, coco_file):
    """The boxes and the truth are turned alike, where the file's are those of the stored picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("1.png", "2.png"):
        with Image.open(coco_file.parent / name) as one:
            one.copy().save(coco_file.parent / name, exif=exif)
    images = find_coco_images(coco_file, "tiny")
    for band in (None, (0.6, 0.7)):
        predictor = FillingPredictor()
        results = segment_boxes(predictor, images, band=band)
        assert predictor.size == ((WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH))
        found = average_precision(images, results)["score_1"]["ap"]
        assert found == pytest.approx(100) if band is None else 20 < found <= 40
