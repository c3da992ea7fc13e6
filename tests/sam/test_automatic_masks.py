"""The generator of all masks against segment_anything's own, plain and stabilised."""

import numpy as np
import pytest
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator

from stable_sam_cuda import StableSamAutomaticMaskGenerator
from stable_sam_cuda.sam import plugin_of, stabilize
from stable_sam_cuda.sam.lite import new_sam_lite

# The small model has random weights: whatever it says is a mask.
OPTIONS = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.9}


@pytest.mark.parametrize("options", [{}, {"crop_n_layers": 1}, {"points_per_batch": 3}], ids=str)
@pytest.mark.parametrize("plugged", [False, True], ids=["plain", "stabilised"])
def test_masks_are_sams(sam, perturb, picture, plugged, options):
    if plugged:
        perturb(plugin_of(stabilize(sam)), scale=0.05)
    expected = SamAutomaticMaskGenerator(sam, **OPTIONS, **options).generate(picture)
    found = StableSamAutomaticMaskGenerator(sam, **OPTIONS, **options).generate(picture)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in ("bbox", "crop_box", "point_coords"):
            assert one[name] == other[name]
        assert np.mean(one["segmentation"] != other["segmentation"]) < 1e-3
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)


def test_the_picture_is_encoded_once(sam, picture):
    calls = []
    sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    StableSamAutomaticMaskGenerator(stabilize(sam), **OPTIONS, points_per_batch=3).generate(picture)
    assert calls == [1]


def test_nothing_found_is_an_empty_list(sam, picture):
    assert StableSamAutomaticMaskGenerator(sam, 2, stability_score_thresh=1.0).generate(picture) == []


def test_half_precision(sam, picture):
    sam.bfloat16()
    records = StableSamAutomaticMaskGenerator(stabilize(sam), **OPTIONS).generate(picture)
    assert records and all(isinstance(record["predicted_iou"], float) for record in records)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"points_per_side": 0}, ValueError, "points_per_side: expected at least 1, got 0"),
        ({"points_per_side": 2.5}, TypeError, "points_per_side: expected an integer, got float"),
        ({"points_per_side": None}, ValueError, "points_per_side: expected a number, or None and point_grids"),
        (
            {"point_grids": [np.zeros((1, 2))]},
            ValueError,
            "points_per_side: expected a number, or None and point_grids",
        ),
        ({"pred_iou_thresh": 2}, ValueError, "pred_iou_thresh: expected a number from 0 to 1, got 2"),
        ({"stability_score_thresh": float("nan")}, ValueError, "stability_score_thresh: .* got nan"),
        ({"points_per_batch": "8"}, TypeError, "points_per_batch: expected an integer, got str"),
        ({"output_mode": "png"}, ValueError, "output_mode: expected one of binary_mask, .* got 'png'"),
        ({"model": None}, TypeError, "sam_model: expected a segment_anything Sam model, got NoneType"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(sam, arguments, error, message):
    with pytest.raises(error, match=message):
        StableSamAutomaticMaskGenerator(**{"model": sam, **arguments})


def test_bad_pictures_are_named(sam, picture):
    with pytest.raises(TypeError, match="image: expected uint8 values"):
        StableSamAutomaticMaskGenerator(sam, 2).generate(picture.astype(np.float32))
    with pytest.raises(TypeError, match="image: expected a numpy array"):
        StableSamAutomaticMaskGenerator(sam, 2).generate(picture.tolist())


def test_thresholds_are_those_of_the_model(sam):
    generator = StableSamAutomaticMaskGenerator(sam)
    assert (generator.pred_iou_thresh, generator.stability_score_thresh) == (0.88, 0.95)
    lite = new_sam_lite("lite0", 64)
    generator = StableSamAutomaticMaskGenerator(lite)
    assert (generator.pred_iou_thresh, generator.stability_score_thresh) == (0.5, 0.6)
    generator = StableSamAutomaticMaskGenerator(lite, pred_iou_thresh=0.7, stability_score_thresh=None)
    assert (generator.pred_iou_thresh, generator.stability_score_thresh) == (0.7, 0.6)


@pytest.mark.parametrize("layers", [0, 1])
def test_progress_ends_at_all_points(sam, picture, layers):
    heard = []
    generator = StableSamAutomaticMaskGenerator(
        sam,
        **OPTIONS,
        points_per_batch=3,
        crop_n_layers=layers,
        progress=lambda done, total: heard.append((done, total)),
    )
    for _ in range(2):  # a second picture is counted anew
        heard.clear()
        generator.generate(picture)
        total = 16 if layers == 0 else 16 + 4 * 16
        assert heard[-1] == (total, total) and heard == sorted(heard) and len(heard) > 2


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([np.zeros((0, 2))], r"point_grids\[0\]: expected points \(N, 2\), N at least 1"),
        ([np.full((1, 2), 50.0)], r"point_grids\[0\]: expected x and y from 0 to 1"),
        ([np.full((1, 2), np.nan)], r"point_grids\[0\]: expected x and y from 0 to 1"),
        ([], "point_grids: expected 1, one a layer"),
    ],
    ids=["empty", "pixels", "nan", "none"],
)
def test_bad_grids_are_named(sam, grids, message):
    with pytest.raises(ValueError, match=message):
        StableSamAutomaticMaskGenerator(sam, None, point_grids=grids)


def test_a_file_is_read_as_the_predictor_reads_it(sam, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "picture.png")
    generator = StableSamAutomaticMaskGenerator(sam, **OPTIONS)
    expected = generator.generate(picture)
    found = generator.generate(tmp_path / "picture.png")
    assert [one["bbox"] for one in found] == [one["bbox"] for one in expected] != []


@pytest.mark.parametrize(
    "options", [{}, {"crop_n_layers": 1}, {"crop_n_layers": 1, "min_mask_region_area": 5}], ids=str
)
def test_a_picture_of_nothing_gives_no_masks(sam, picture, options):
    generator = StableSamAutomaticMaskGenerator(sam, 2, pred_iou_thresh=1.0, stability_score_thresh=1.0, **options)
    assert generator.generate(picture) == []
