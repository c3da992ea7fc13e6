"""What users call, from the picture to the masks, on a GPU against the CPU's answer in float32.

The same code runs with the CPU as its device, half types included, so that without a GPU only what needs one is
skipped. Model, plugin and picture are real: `sam_lite` with its shipped plugin, and a photograph.
"""

from collections.abc import Callable
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from stable_sam_cuda import StableSamAutomaticMaskGenerator, StableSamPredictor
from stable_sam_cuda.data.prompts import PromptMix
from stable_sam_cuda.evaluation.protocol import evaluate
from stable_sam_cuda.sam import load_sam, stabilize
from stable_sam_cuda.sam.plugin_io import read_plugin, shipped_plugins
from stable_sam_cuda.sam.prompt_encoding import encode_prompts
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, decode
from stable_sam_cuda.training.loop import PluginTrainer
from stable_sam_cuda.training.methods import install_method
from stable_sam_cuda.training.options import TrainingOptions
from stable_sam_cuda.training.pictures import EncodedPictures

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
BLOCKS = {"plain": 0, "one-block": 1, "both-blocks": 2}
# Every model on a GPU; on a CPU, whose own tests are elsewhere, the one that has everything.
DEVICE_AND_BLOCKS = [
    pytest.param("cpu", 2, id="cpu-both-blocks"),
    *(pytest.param("cuda", blocks, id=f"cuda-{name}", marks=pytest.mark.gpu) for name, blocks in BLOCKS.items()),
]
PICTURE = Path(__file__).parents[2] / "examples" / "chelsea.png"  # 451 x 300: a cat
PROMPTS = (
    {"box": [100, 20, 400, 290]},
    {"point_coords": [[200, 120]], "point_labels": [1]},
    {"box": [150, 60, 300, 200], "point_coords": [[220, 130]], "point_labels": [1]},
    {"box": [90, 30, 380, 280]},
    {"point_coords": [[200, 120], [20, 280]], "point_labels": [1, 0]},
    {"mask_input": np.where(np.hypot(*np.mgrid[-90:166, -128:128]) < 80, 6.0, -6.0)[None]},
)


class Limits(NamedTuple):
    """What may differ: the share of a mask's pixels, scores, and logits in the norm, relative to the CPU's."""

    pixels: float
    scores: float
    logits: float


# The half types' own rounding, measured on a CPU for the first five prompts: float16 0.0003, 0.0004 and 0.0009,
# bfloat16 0.006, 0.013 and 0.023. A device sums in another order, and logits of a mask prompt are larger.
LIMITS = {
    torch.float32: Limits(0.001, 0.001, 0.001),
    torch.float16: Limits(0.002, 0.003, 0.004),
    torch.bfloat16: Limits(0.02, 0.04, 0.07),
}
HALF_TYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """cuDNN's convolutions would round float32 to ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@cache
def picture():
    return np.asarray(Image.open(PICTURE).convert("RGB"))


@cache
def sam_on_cpu(blocks):
    sam = load_sam("sam_lite", device="cpu")
    if blocks:
        plugin, _ = read_plugin(shipped_plugins()["stable_sam_lite"])
        plugin.blocks = blocks
        stabilize(sam, plugin)
    return sam


@cache
def predictor_on(device, blocks, dtype=torch.float32):
    """With the picture set; shared by all tests, which leave it as it is."""
    predictor = StableSamPredictor(deepcopy(sam_on_cpu(blocks)).to(device, dtype))
    predictor.set_image(picture())
    return predictor


@cache
def truth(blocks):
    """The CPU's predictions of all prompts, one by one."""
    predictor = predictor_on("cpu", blocks)
    return [predictor.predict(**prompt) for prompt in PROMPTS]


def assert_close(found, expected, dtype=torch.float32):
    """Masks, scores and logits of a prompt or of several."""
    masks, scores, logits = (np.asarray(torch.as_tensor(part).cpu()) for part in found)
    true_masks, true_scores, true_logits = (np.asarray(torch.as_tensor(part).cpu()) for part in expected)
    limits = LIMITS[dtype]
    assert masks.shape == true_masks.shape
    assert (masks != true_masks).mean() <= limits.pixels
    assert np.abs(scores - true_scores).max() <= limits.scores
    assert np.linalg.norm(logits - true_logits) <= limits.logits * np.linalg.norm(true_logits)


@pytest.mark.parametrize(
    ("device", "blocks", "dtype"),
    [
        *(("cpu", blocks, torch.float32) for blocks in BLOCKS.values()),
        ("cpu", 2, torch.bfloat16),
        *(pytest.param("cuda", blocks, dtype, marks=pytest.mark.gpu) for dtype in LIMITS for blocks in BLOCKS.values()),
    ],
    ids=str,
)
def test_predict_and_predict_batch(device, blocks, dtype):
    predictor, expected = predictor_on(device, blocks, dtype), truth(blocks)
    assert 0.1 < expected[0][0].mean() < 0.9
    for found, true in zip(predictor.predict_batch(PROMPTS, batch_size=2), expected, strict=True):
        assert found[0].dtype == bool
        assert {part.dtype for part in found[1:]} == {np.dtype(np.float32)}
        assert_close(found, true, dtype)
    assert_close(predictor.predict(**PROMPTS[2]), expected[2], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_a_device_that_is_not_the_current_one(blocks):
    predictor = predictor_on("cuda:1", blocks)
    for found, true in zip(predictor.predict_batch(PROMPTS), truth(blocks), strict=True):
        assert_close(found, true)
    assert torch.cuda.current_device() == 0


def tensors(device, shift=0.0):
    """Prompts of every kind as `predict_torch` takes them: three boxes, points with padding, and masks."""
    boxes = torch.tensor([[90.0, 30, 420, 300], [150, 70, 330, 220], [100, 40, 450, 310]]) + shift
    points = torch.tensor([[[220.0, 130], [30, 310]]]).expand(3, -1, -1) + shift
    labels = torch.tensor([[1, 0], [1, -1], [1, 1]])
    masks = torch.from_numpy(PROMPTS[-1]["mask_input"]).float().expand(3, 1, -1, -1) - shift
    given = {"boxes": boxes, "point_coords": points, "point_labels": labels, "mask_input": masks}
    nothing = {"point_coords": None, "point_labels": None}
    return {
        "boxes": nothing | on(device, given, "boxes"),
        "one box": nothing | {"boxes": given["boxes"][:1].to(device)},
        "points": on(device, given, "point_coords", "point_labels"),
        "everything": on(device, given, *given),
    }


def on(device, given, *names):
    return {name: given[name].to(device).contiguous() for name in names}


KINDS = ("boxes", "one box", "points", "everything")


@contextmanager
def waits_are_errors(device):
    """On a GPU PyTorch raises where the host is about to wait; a CPU has nothing to wait for."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("device", "blocks"), DEVICE_AND_BLOCKS)
def test_predict_torch_without_waits(device, kind, blocks):
    predictor, cpu = predictor_on(device, blocks), predictor_on("cpu", blocks)
    given = tensors(device)[kind]
    predictor.predict_torch(**given)  # the first call compiles and loads kernels
    with waits_are_errors(device):
        found = predictor.predict_torch(**given)
        from_the_host = predictor.predict_torch(**tensors("cpu")[kind])
    expected = cpu.predict_torch(**tensors("cpu")[kind])
    assert_close(found, expected)
    assert_close(from_the_host, expected)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.bfloat16), *(pytest.param("cuda", half, marks=pytest.mark.gpu) for half in HALF_TYPES)],
    ids=str,
)
def test_predict_torch_of_half_models_without_waits(device, dtype):
    predictor, cpu = predictor_on(device, 2, dtype), predictor_on("cpu", 2)
    given = tensors(device)["everything"]
    predictor.predict_torch(**given)
    with waits_are_errors(device):
        found = predictor.predict_torch(**given)
    assert_close(found, cpu.predict_torch(**tensors("cpu")["everything"]), dtype)


@pytest.mark.parametrize(("device", "blocks"), [one for one in DEVICE_AND_BLOCKS if one.values[1]])
def test_decoding_with_gradients_without_waits(device, blocks):
    """Prompts of two pictures; every gradient of the plugin, to a thousandth of its norm."""
    gradients = {}
    for place in ("cpu", device):
        predictor = predictor_on(place, blocks)
        sam, given = deepcopy(predictor.model), tensors(place)["points"]
        images = torch.cat([predictor.features, predictor.features.flip(-1)])
        index = torch.tensor([0, 1, 1], device=place)
        for waits in ("cpu", place)[place == "cpu" :]:  # on a GPU the first time compiles and loads kernels
            sam.zero_grad()
            with waits_are_errors(waits):
                embeddings = encode_prompts(sam.prompt_encoder, *given.values(), None, None)
                logits, scores = decode(sam, images[index], *embeddings, ALL_MASKS)
                (logits.sigmoid().mean() + scores.mean()).backward()
        gradients[place] = {name: p.grad.cpu() for name, p in sam.named_parameters() if p.requires_grad}
    assert_same_gradients(gradients[device], gradients["cpu"])


def assert_same_gradients(found, expected):
    """To a thousandth of their norm; a parameter whose gradient is nothing but rounding is measured by the largest."""
    assert found.keys() == expected.keys()
    largest = max(gradient.norm().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6 * largest, name


def record(device, call) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
    """What runs ``call`` again, and the tensors that it fills: a CUDA graph. A CPU calls and copies."""
    if device == "cpu":
        results = call()

        def replay():
            for result, again in zip(results, call(), strict=True):
                result.copy_(again)

        return replay, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("device", "blocks"), DEVICE_AND_BLOCKS)
def test_a_graph_replays_on_new_prompts(device, kind, blocks):
    predictor = predictor_on(device, blocks)
    given = tensors(device)[kind]
    before = predictor.predict_torch(**given)
    replay, results = record(device, lambda: predictor.predict_torch(**given))
    for name, tensor in tensors(device, shift=25.0)[kind].items():
        if tensor is not None:
            given[name].copy_(tensor)
    replay()
    expected = predictor.predict_torch(**given)
    assert not torch.equal(expected[2], before[2])
    assert_close(results, expected)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_graph_replays_on_new_weights(device):
    """It reads the weights themselves: nothing that calls keep of them is in it."""
    predictor = copy(predictor_on(device, 2, torch.bfloat16))
    predictor.model = deepcopy(predictor.model).requires_grad_(False)
    given = tensors(device)["everything"]
    predictor.predict_torch(**given)  # keeps what it computes from the weights
    replay, results = record(device, lambda: predictor.predict_torch(**given))
    before = [result.clone() for result in results]
    with torch.no_grad():
        predictor.model.mask_decoder.transformer.final_attn_token_to_image.k_proj.weight.mul_(-1)
        predictor.model.prompt_encoder.point_embeddings[2].weight.mul_(-1)
    replay()
    assert not torch.equal(results[2], before[2])
    assert_close(results, predictor.predict_torch(**given), torch.bfloat16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["boxes", "point_coords", "point_labels", "mask_input"])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.gpu
def test_bad_values_give_nan(blocks, name, value):
    """Of their prompt, not of its neighbours. tests/sam/test_predictor.py has the same without a GPU."""
    predictor = predictor_on("cuda", blocks)
    given = tensors("cuda")["everything"]
    given["point_labels"] = given["point_labels"].float()
    expected = predictor.predict_torch(**given)
    given[name][1].view(-1)[0] = value
    masks, scores, logits = predictor.predict_torch(**given)
    assert scores[1].isnan().all()
    assert logits[1].isnan().all()
    assert not masks[1].any()
    assert_close([part[[0, 2]] for part in (masks, scores, logits)], [part[[0, 2]] for part in expected])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_automatic_masks(device):
    """Of sixteen points, nothing filtered; each of the CPU's masks is found at its point, with an IoU of 0.98."""
    options = {
        "points_per_side": 4,
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
        "box_nms_thresh": 1.0,
    }
    found, expected = (
        StableSamAutomaticMaskGenerator(deepcopy(sam_on_cpu(2)).to(place), **options).generate(picture())
        for place in (device, "cpu")
    )
    assert len(found) == len(expected) > 16
    for true in expected:
        same_point = [mask for mask in found if mask["point_coords"] == true["point_coords"]]
        best = max(same_point, key=lambda mask: iou(mask["segmentation"], true["segmentation"]))
        assert iou(best["segmentation"], true["segmentation"]) >= 0.98
        assert best["predicted_iou"] == pytest.approx(true["predicted_iou"], abs=LIMITS[torch.float32].scores)


def iou(one, other):
    return (one & other).sum() / max((one | other).sum(), 1)


@dataclass(frozen=True)
class Cat:
    """The picture with one object: the mask that the CPU finds for the first prompt."""

    name: str = "examples/chelsea"
    set_name: str = "examples"

    def load(self):
        return picture(), truth(0)[0][0][0].astype(np.uint8)


@pytest.mark.parametrize("kind", ["noisy_box", "three_points"])
@pytest.mark.parametrize(("device", "blocks"), [one for one in DEVICE_AND_BLOCKS if one.values[1]])
def test_a_training_step(device, blocks, kind, tmp_path):
    """Loss and overlap to a thousandth, gradients as `assert_same_gradients`, parameters by the first step of Adam."""
    answers = []
    for place in (device, "cpu"):
        sam = load_sam("sam_lite", device=place)
        plugin, _ = read_plugin(shipped_plugins()["stable_sam_lite"])
        plugin.blocks = blocks
        parameters = install_method(sam, "stable", plugin)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        mix = PromptMix(**{name: float(name == kind) for name in vars(PromptMix())})
        options = TrainingOptions(images=1, epochs=1, mix=mix)
        trainer = PluginTrainer(sam, parameters, EncodedPictures(sam, [Cat()]), tmp_path, options)
        with trainer.probe:
            record = trainer._train_step(trainer._examples())
        assert all(not torch.equal(parameter, before[name]) for name, parameter in parameters.items())
        answers.append((record, {name: parameter.grad.cpu() for name, parameter in parameters.items()}))
    (found, gradients), (expected, true_gradients) = answers
    assert found["kinds"] == expected["kinds"] == [kind]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["iou"] == pytest.approx(expected["iou"], rel=1e-3)
    assert_same_gradients(gradients, true_gradients)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_evaluation_of_one_picture(device):
    """IoU, boundary IoU, stability and the router's weight to 0.002: some pixels of an outline of a thousand."""
    kinds = ("gt_box", "noisy_box", "3_points", "coarse_mask")
    found, expected = (
        evaluate(StableSamPredictor(deepcopy(sam_on_cpu(2)).to(place)), [Cat()], kinds, draws=3)
        for place in (device, "cpu")
    )
    assert [one.kind for one in found] == [one.kind for one in expected] == list(kinds)
    for one, other in zip(found, expected, strict=True):
        for name in ("iou", "boundary_iou", "stability", "alpha_1"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=0.002), (one.kind, name)
