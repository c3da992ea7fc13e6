import copy

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from tolerances import DECODER, assert_matches

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.notes import DataWarning
from stable_sam_cuda.sam import StableSamPredictor, plugin_of, stabilize
from stable_sam_cuda.sam import prompt as prompt_checks
from stable_sam_cuda.sam.predictor import UPSCALING_BYTES
from stable_sam_cuda.sam.shared_decoder import decode

BOX = np.array([20, 15, 80, 75])
POINT = {"point_coords": np.array([[50, 45]]), "point_labels": np.array([1])}
MASK_SIZE = (1, 32, 32)


@pytest.fixture
def predictor(sam, picture):
    predictor = StableSamPredictor(sam)
    predictor.set_image(picture)
    return predictor


def mask_prompt():
    return np.random.default_rng(0).standard_normal(MASK_SIZE).astype(np.float32)


PROMPTS = {
    "point": POINT,
    "two-points": {"point_coords": [[50, 45], [5.5, 5]], "point_labels": [1, 0]},
    "box": {"box": BOX},
    "box-and-point": {"box": BOX.tolist(), **POINT},
    "mask": {"mask_input": mask_prompt()},
    "everything": {"box": BOX, **POINT, "mask_input": mask_prompt()},
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_float32_results_are_sam_predictors(sam, picture, prompt, image_format):
    as_arrays = {name: np.asarray(value) for name, value in prompt.items()}
    ours, theirs = StableSamPredictor(sam), SamPredictor(sam)
    for predictor in (ours, theirs):
        predictor.set_image(picture, image_format)
    assert torch.equal(ours.get_image_embedding(), theirs.get_image_embedding())
    for return_logits in (False, True):
        found = ours.predict(**prompt, return_logits=return_logits)
        expected = theirs.predict(**as_arrays, return_logits=return_logits)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert_close_to_sam(torch.from_numpy(one), torch.from_numpy(other))


def assert_close_to_sam(found, expected):
    """Equal masks; equal logits and scores but for the order in which the decoder sums."""
    if found.dtype == torch.bool:
        assert torch.equal(found, expected)
    else:
        assert_matches("prediction", found, expected, DECODER[found.dtype])


def test_predict_torch_is_sam_predictors(sam, picture):
    ours, theirs = StableSamPredictor(sam), SamPredictor(sam)
    points, labels = torch.rand(3, 2, 2) * 90, torch.tensor([[1, 0], [1, 1], [1, -1]])
    boxes = torch.tensor([[10.0, 10, 50, 60], [20, 5, 90, 80], [0, 0, 30, 30]])
    for predictor in (ours, theirs):
        predictor.set_image(picture)
    for one, other in zip(
        ours.predict_torch(points, labels, boxes), theirs.predict_torch(points, labels, boxes), strict=True
    ):
        assert_close_to_sam(one, other)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_ragged_batch_is_its_prompts_one_by_one(predictor, batch_size):
    prompts = [*PROMPTS.values(), {"box": BOX + 7}, {"point_coords": [[9, 9]], "point_labels": [0]}, {"box": BOX - 5}]
    results = predictor.predict_batch(prompts, return_logits=True, batch_size=batch_size)
    assert len(results) == len(prompts)
    for prompt, result in zip(prompts, results, strict=True):
        for one, other in zip(result, predictor.predict(**prompt, return_logits=True), strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 2, 16])
@pytest.mark.parametrize("return_logits", [False, True], ids=["masks", "logits"])
def test_masks_upscaled_together_are_those_upscaled_alone(predictor, monkeypatch, at_a_time, return_logits):
    prompts = [{"box": BOX + shift} for shift in range(5)]
    expected = predictor.predict_batch(prompts, return_logits=return_logits)
    monkeypatch.setattr(predictor, "_prompts_at_a_time", lambda masks: at_a_time)
    for found, alone in zip(predictor.predict_batch(prompts, return_logits=return_logits), expected, strict=True):
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_gpu_upscales_what_its_memory_is_for(predictor, monkeypatch):
    monkeypatch.setattr(StableSamPredictor, "device", torch.device("cuda"))
    assert predictor._prompts_at_a_time(3) > 100
    predictor.original_size = (3000, 4000)
    bytes_a_mask = 4 * 128**2 + 5 * 12_000_000
    assert predictor._prompts_at_a_time(3) == UPSCALING_BYTES // (3 * bytes_a_mask) == 2
    predictor.original_size = (30_000, 40_000)
    assert predictor._prompts_at_a_time(3) == 1


BAD_VALUES = {
    "nan point": ("point_coords", torch.nan),
    "infinite point": ("point_coords", torch.inf),
    "label": ("point_labels", 3.0),
    "nan label": ("point_labels", torch.nan),
    "nan box": ("boxes", torch.nan),
    "infinite box": ("boxes", -torch.inf),
    "nan mask": ("mask_input", torch.nan),
    "infinite mask": ("mask_input", torch.inf),
}


@pytest.mark.parametrize("blocks", [0, 1, 2], ids=["plain", "one-block", "both-blocks"])
@pytest.mark.parametrize(("name", "value"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_on_a_gpu_give_nan(sam, picture, monkeypatch, blocks, name, value):
    """There they cannot be refused without a wait. One prompt's do not touch the others'."""
    if blocks:
        stabilize(sam, DeformableSampler(blocks=blocks))
    predictor = StableSamPredictor(sam)
    predictor.set_image(picture)
    given = {
        "point_coords": torch.full((3, 1, 2), 50.0),
        "point_labels": torch.ones(3, 1),
        "boxes": torch.tensor([[10.0, 20, 90, 80]]).repeat(3, 1),
        "mask_input": torch.randn(3, 1, 32, 32),
    }
    expected = predictor.predict_torch(**given)
    given[name][1].view(-1)[0] = value
    monkeypatch.setattr(prompt_checks, "_is_readable", lambda tensor: False)
    masks, scores, logits = predictor.predict_torch(**given)
    assert scores[1].isnan().all()
    assert logits[1].isnan().all()
    assert not masks[1].any()
    for found, before in zip((masks, scores, logits), expected, strict=True):
        assert torch.equal(found[[0, 2]], before[[0, 2]])


def test_batches_pass_the_output_options_on(predictor):
    (masks, scores, low), *_ = predictor.predict_batch([{"box": BOX}], multimask_output=False)
    assert (masks.shape, scores.shape, low.shape) == ((1, 90, 120), (1,), (1, 32, 32))
    assert masks.dtype == bool
    assert predictor.predict_batch([]) == []


@pytest.mark.parametrize("conversion", ["whole-model", "load_sam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_float32_masks_near_the_full_ones(sam, picture, perturb, dtype, conversion):
    stabilize(sam)
    perturb(plugin_of(sam), scale=0.02)
    half = copy.deepcopy(sam)
    if conversion == "whole-model":
        half.to(dtype)
    else:
        half.image_encoder.to(dtype)
        half.mask_decoder.to(dtype)
    results = []
    for model in (sam, half):
        predictor = StableSamPredictor(model)
        predictor.set_image(picture)
        results.append(predictor.predict(box=BOX, **POINT, return_logits=True))
    for full, found in zip(*results, strict=True):
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        # A dozen layers, each of which rounds to the dtype.
        assert np.abs(found - full).mean() < 8 * torch.finfo(dtype).eps * np.abs(full).mean()
    assert half.prompt_encoder.no_mask_embed.weight.dtype == (dtype if conversion == "whole-model" else torch.float32)


def test_serves_the_automatic_mask_generator(sam, picture):
    generator = SamAutomaticMaskGenerator(sam, points_per_side=2, pred_iou_thresh=-100, stability_score_thresh=0)
    expected = generator.generate(picture)
    generator.predictor = StableSamPredictor(sam)
    found = generator.generate(picture)
    assert [mask["bbox"] for mask in found] == [mask["bbox"] for mask in expected]
    assert len(found) > 0


def test_a_box_beyond_the_picture_is_clipped_to_it(predictor):
    found = predictor.predict(box=[-30, 10, 150, 200], return_logits=True)
    expected = predictor.predict(box=[0, 10, 120, 90], return_logits=True)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_results_do_not_follow_later_pictures(predictor, picture):
    expected = predictor.predict(box=BOX, return_logits=True)[0]
    copy_of_it = expected.copy()
    predictor.set_image(picture[::-1].copy())
    predictor.predict(box=BOX)
    np.testing.assert_array_equal(expected, copy_of_it)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ({}, ValueError, "prompt: expected at least one of point_coords, box and mask_input, got an empty prompt"),
        ({"point_coords": np.zeros((0, 2)), "point_labels": []}, ValueError, "got an empty prompt"),
        ({"point_coords": [[1, 2]]}, ValueError, "point_labels: expected with point_coords, got None"),
        ({"point_labels": [1], "box": BOX}, ValueError, "point_coords: expected with point_labels, got None"),
        (
            {"point_coords": [1, 2], "point_labels": [1]},
            ValueError,
            r"point_coords: expected shape \(N, 2\), got \(2,\)",
        ),
        (
            {"point_coords": [[1, 2]], "point_labels": [1, 0]},
            ValueError,
            r"point_labels: expected shape \(1,\), .* \(2,\)",
        ),
        ({"point_coords": [[1, 2]], "point_labels": [2]}, ValueError, r"point_labels: expected 1 .* got \[2\.0\]"),
        ({"point_coords": [[1, 2]], "point_labels": [-1]}, ValueError, "point_labels: expected 1"),
        ({"point_coords": [[1, 2]], "point_labels": [float("nan")]}, ValueError, "point_labels: expected 1"),
        (
            {"point_coords": [[1, float("nan")]], "point_labels": [1]},
            ValueError,
            "point_coords: expected finite numbers",
        ),
        (
            {"point_coords": [[1, float("inf")]], "point_labels": [1]},
            ValueError,
            "point_coords: expected finite numbers",
        ),
        ({"point_coords": [[121, 5]], "point_labels": [1]}, ValueError, "points inside the 120 x 90 picture"),
        ({"point_coords": [[5, -1]], "point_labels": [1]}, ValueError, "points inside the 120 x 90 picture"),
        ({"point_coords": [["a", "b"]], "point_labels": [1]}, TypeError, "point_coords: expected numbers, got"),
        (
            {"point_coords": [[1, 2], [3]], "point_labels": [1, 1]},
            ValueError,
            "point_coords: expected a rectangular array",
        ),
        ({"box": [1, 2, 3]}, ValueError, r"box: expected shape \(4,\) as x0, y0, x1, y1, got \(3,\)"),
        ({"box": [1, 2, float("nan"), 9]}, ValueError, "box: expected finite numbers"),
        ({"box": [1, 2, float("inf"), 9]}, ValueError, "box: expected finite numbers"),
        ({"box": [10, 2, 10, 9]}, ValueError, "box: expected x0 < x1 and y0 < y1"),
        ({"box": [10, 9, 20, 2]}, ValueError, "box: expected x0 < x1 and y0 < y1"),
        ({"box": [120, 2, 130, 9]}, ValueError, "box: expected a box that meets the 120 x 90 picture"),
        ({"box": [1, -9, 5, 0]}, ValueError, "box: expected a box that meets the 120 x 90 picture"),
        ({"mask_input": np.zeros((1, 30, 32))}, ValueError, r"mask_input: expected shape \(1, 32, 32\)"),
        ({"mask_input": np.full(MASK_SIZE, np.nan)}, ValueError, "mask_input: expected finite numbers"),
    ],
    ids=lambda value: ",".join(value) + "-" if isinstance(value, dict) else "",
)
def test_bad_prompts_are_named_alone_and_in_a_batch(predictor, prompt, error, message):
    with pytest.raises(error, match=message):
        predictor.predict(**prompt)
    with pytest.raises(error, match=rf"prompts\[1\]: .*{message}"):
        predictor.predict_batch([{"box": BOX}, prompt])


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([{"boxes": BOX}], ValueError, r"prompts\[0\]: prompt: expected the keys point_coords, .* got boxes"),
        ([BOX], TypeError, r"prompts\[0\]: prompt: expected a mapping of .* got ndarray"),
    ],
    ids=["key", "type"],
)
def test_bad_batches_are_named(predictor, prompts, error, message):
    with pytest.raises(error, match=message):
        predictor.predict_batch(prompts)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        predictor.predict_batch([{"box": BOX}], batch_size=0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "got an empty prompt"),
        ({"point_coords": torch.zeros(2, 3, 2)}, r"point_labels: expected shape \(2, 3\), got None"),
        ({"point_labels": torch.ones(2, 3), "boxes": torch.ones(2, 4)}, r"point_coords: expected shape .* got None"),
        (
            {"point_coords": torch.zeros(2, 2), "point_labels": torch.ones(2, 1)},
            r"point_coords: expected shape \(2, 'N', 2\)",
        ),
        ({"point_coords": torch.zeros(2, 1, 2), "point_labels": torch.full((2, 1), 2)}, r"point_labels: .* got \[2\]"),
        (
            {"point_coords": torch.zeros(2, 1, 2), "point_labels": torch.full((2, 1), 255, dtype=torch.uint8)},
            r"point_labels: .* got \[255\]",
        ),
        (
            {"point_coords": torch.full((2, 1, 2), torch.nan), "point_labels": torch.ones(2, 1)},
            "point_coords: expected finite",
        ),
        ({"boxes": torch.zeros(4)}, r"boxes: expected shape \(4, 4\), got \(4,\)"),
        ({"boxes": torch.full((1, 4), torch.inf)}, "boxes: expected finite numbers"),
        (
            {"boxes": torch.ones(2, 4), "mask_input": torch.zeros(1, *MASK_SIZE)},
            r"mask_input: expected shape \(2, 1, 32, 32\)",
        ),
    ],
    ids=["empty", "no-labels", "no-points", "points-2d", "label", "byte", "nan-point", "box-1d", "inf-box", "batches"],
)
def test_bad_tensors_are_named(predictor, tensors, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict_torch(**{"point_coords": None, "point_labels": None} | tensors)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (
            np.zeros((8, 8), np.uint8),
            ValueError,
            r"image: expected shape \(H, W, 3\), got \(8, 8\) \(convert grey or RGBA",
        ),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"got \(8, 8, 4\) \(convert grey or RGBA"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"image: expected shape \(H, W, 3\), got \(3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), TypeError, "image: expected uint8 values from 0 to 255, got float32"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "image: expected a picture that keeps a pixel"),
        (np.zeros((1, 1000, 3), np.uint8), ValueError, "image: expected a picture that keeps a pixel at 128 px"),
        (torch.zeros(8, 8, 3), TypeError, "image: expected a numpy array .* got Tensor"),
    ],
    ids=["grey", "rgba", "channels-first", "float", "empty", "thread", "tensor"],
)
def test_bad_pictures_are_named(sam, image, error, message):
    predictor = StableSamPredictor(sam)
    with pytest.raises(error, match=message):
        predictor.set_image(image)
    assert not predictor.is_image_set


def test_bad_formats_and_shapes_are_named(sam, picture):
    predictor = StableSamPredictor(sam)
    with pytest.raises(ValueError, match="image_format: expected 'RGB' or 'BGR', got 'HSV'"):
        predictor.set_image(picture, "HSV")
    with pytest.raises(ValueError, match=r"transformed_image: expected \(1, 3, H, W\) of longer side 128, got"):
        predictor.set_torch_image(torch.zeros(1, 3, 64, 64), (64, 64))
    with pytest.raises(TypeError, match="sam_model: expected a segment_anything Sam model, got Linear"):
        StableSamPredictor(torch.nn.Linear(2, 2))


def test_masks_before_a_picture_are_refused(sam, picture):
    predictor = StableSamPredictor(sam)
    calls = (
        lambda: predictor.predict(box=BOX),
        lambda: predictor.predict_batch([{"box": BOX}]),
        lambda: predictor.predict_torch(None, None, torch.ones(1, 4)),
        predictor.get_image_embedding,
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="set_image"):
            call()
    predictor.set_image(picture)
    predictor.reset_image()
    for call in calls:
        with pytest.raises(RuntimeError, match="set_image"):
            call()


NOTHING = {
    "boxes": (None, None, torch.zeros(0, 4)),
    "points": (torch.zeros(0, 1, 2), torch.zeros(0, 1)),
    "points-of-no-number": (torch.zeros(0, 0, 2), torch.zeros(0, 0)),
    "points-and-boxes": (torch.zeros(0, 3, 2), torch.zeros(0, 3), torch.zeros(0, 4)),
    "masks": (None, None, None, torch.zeros(0, 1, 32, 32)),
}


@pytest.mark.parametrize("prompts", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("blocks", [0, 1, 2], ids=["plain", "one-block", "two-blocks"])
@pytest.mark.parametrize("multimask", [False, True], ids=["one-mask", "three-masks"])
def test_no_prompt_gives_no_mask(sam, picture, blocks, multimask, prompts):
    predictor = StableSamPredictor(stabilize(sam, DeformableSampler(blocks=blocks)) if blocks else sam)
    predictor.set_image(picture)
    count = 3 if multimask else 1
    for return_logits in (False, True):
        masks, scores, logits = predictor.predict_torch(
            *prompts, multimask_output=multimask, return_logits=return_logits
        )
        assert masks.shape == (0, count, 90, 120) and masks.dtype == (torch.float32 if return_logits else torch.bool)
        assert scores.shape == (0, count) and logits.shape == (0, count, 32, 32)
        assert scores.dtype == logits.dtype == torch.float32


def test_no_prompt_leaves_training_alone(sam):
    plugin = plugin_of(stabilize(sam))
    embedding = torch.rand(1, 256, 8, 8)
    logits, scores = decode(sam, embedding, torch.zeros(0, 2, 256), torch.zeros(1, 256, 8, 8))
    sam.mask_decoder.requires_grad_(True)
    logits, scores = decode(sam, embedding, torch.zeros(0, 2, 256), torch.zeros(1, 256, 8, 8))
    (logits.sum() + scores.sum()).backward()
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in plugin.parameters())


DETECTIONS = {
    "bfloat16": torch.tensor([10.0, 12, 80, 70], dtype=torch.bfloat16),
    "float16": torch.tensor([10.0, 12, 80, 70], dtype=torch.float16),
    "int64": torch.tensor([10, 12, 80, 70]),
    "requires-grad": torch.tensor([10.0, 12, 80, 70], requires_grad=True),
    "a-graph": torch.tensor([5.0, 6, 40, 35], requires_grad=True) * 2,
    "conjugate-free-view": torch.tensor([[10.0, 12, 80, 70]] * 2).t()[:, 0],
    "list-of-tensors": [torch.tensor(10.0), torch.tensor(12.0), torch.tensor(80.0, requires_grad=True), 70],
    "numpy-float16": np.array([10, 12, 80, 70], np.float16),
}


@pytest.mark.parametrize("box", DETECTIONS.values(), ids=DETECTIONS)
def test_boxes_as_detectors_give_them(predictor, box):
    expected = predictor.predict(box=[10, 12, 80, 70])
    for found, wanted in zip(predictor.predict(box=box), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    points = torch.tensor([[30.0, 40.0]], dtype=torch.bfloat16, requires_grad=True)
    expected = predictor.predict([[30, 40]], [1])
    for found, wanted in zip(predictor.predict(points, torch.ones(1, dtype=torch.bfloat16)), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_tensors_of_no_numbers_are_named(predictor):
    with pytest.raises(TypeError, match=r"box: expected numbers, got Tensor: it holds torch.complex64"):
        predictor.predict(box=torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="box: expected numbers"):
        predictor.predict(box=torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match="boxes: expected a tensor, got ndarray"):
        predictor.predict_torch(None, None, np.zeros((1, 4)))


@pytest.mark.parametrize(
    "box", [[0.24, 0.26, 0.64, 0.83], [0, 0, 1, 1], [0.0, 0.5, 1.0, 0.75], [-0.01, 0.2, 0.6, 1.001]], ids=str
)
def test_boxes_in_fractions_of_the_picture_are_refused(predictor, box):
    with pytest.raises(ValueError, match=r"box: expected pixels, got .*looks normalised; in pixels it would be \["):
        predictor.predict(box=box)


def test_a_picture_is_taken_from_an_array_an_image_or_a_file(sam, picture, tmp_path):
    predictor = StableSamPredictor(sam)
    predictor.set_image(picture)
    expected = predictor.get_image_embedding()
    image = Image.fromarray(picture)
    image.save(tmp_path / "picture.png")
    upright = Image.fromarray(np.rot90(picture).copy())  # turned by 90 degrees to the left; orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "turned.png", exif=exif)
    for given in (image, image.convert("RGBA"), tmp_path / "picture.png", str(tmp_path / "turned.png")):
        predictor.set_image(given)
        assert predictor.original_size == picture.shape[:2]
        assert torch.equal(predictor.get_image_embedding(), expected)
    with pytest.warns(DataWarning, match="image: a Pillow image is taken as its pixels lie; the turn that its EXIF"):
        predictor.set_image(Image.open(tmp_path / "turned.png"))
    assert predictor.original_size == picture.shape[1::-1]  # as `np.array(image)` has it, and a detector on that
    with pytest.raises(ValueError, match="image_format: expected 'BGR' with an array"):
        predictor.set_image(image, "BGR")
    with pytest.raises(FileNotFoundError, match=r"nope\.png"):
        predictor.set_image(tmp_path / "nope.png")


def test_a_picture_that_is_refused_leaves_none(predictor):
    with pytest.raises(FileNotFoundError):
        predictor.set_image("nope.png")
    with pytest.raises(RuntimeError, match="no picture is set"):
        predictor.predict(box=BOX)
