"""Prompts are encoded as by SAM's own prompt encoder, without its waits, and in float32 from weights of any dtype."""

import gc
from copy import deepcopy

import pytest
import torch
from segment_anything.modeling import PromptEncoder
from torch import nn

from stable_sam_cuda.sam import memo, prompt_encoding
from stable_sam_cuda.sam.lite import set_image_size
from stable_sam_cuda.sam.prompt_encoding import dense_pe, encode_prompts, in_float32


@pytest.fixture
def encoder(sam):
    """Frozen, of a 128 px input, no weight of which is zero."""
    return sam.prompt_encoder.requires_grad_(False)


def prompts(kind, count=3, label_dtype=torch.int64):
    generator = torch.Generator().manual_seed(0)
    number = 1 if kind == "one-point" else 4
    corners = torch.rand(count, 2, generator=generator) * 60
    labels = torch.tensor([1, 0, 1, 0 if label_dtype in (torch.uint8, torch.bool) else -1])[:number]
    masks = torch.randn(count, 1, 32, 32, generator=generator)
    return {
        "points": torch.rand(count, number, 2, generator=generator) * 128 if "point" in kind else None,
        "labels": labels.expand(count, -1).to(label_dtype) if "point" in kind else None,
        "boxes": torch.cat([corners, corners + 40], dim=1) if "box" in kind else None,
        "masks": masks if "mask" in kind else None,
    }


def sams_own(encoder, points, labels, boxes, masks):
    given = None if points is None else (points, labels.to(torch.int))
    return encoder(points=given, boxes=boxes, masks=masks)


KINDS = ("one-point", "points", "box", "mask", "one-point-box", "points-box-mask", "points-mask")


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_sams(encoder, kind, count, autocast):
    given = prompts(kind, count)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = encode_prompts(encoder, **given), sams_own(encoder, **given)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, other)
    assert found[1].stride(0) == expected[1].stride(0)  # one for all prompts, by which the decoder knows it


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.int8, torch.int32, torch.float32, torch.float64], ids=str
)
def test_labels_of_any_dtype(encoder, dtype):
    given = prompts("points", label_dtype=dtype)
    assert torch.equal(encode_prompts(encoder, **given)[0], sams_own(encoder, **given)[0])


def test_gradients_are_sams(encoder):
    encoder.requires_grad_(True)
    given, gradients = prompts("points-box-mask"), []
    for embeddings in (encode_prompts(encoder, **given), sams_own(encoder, **given)):
        total = sum((e * torch.arange(e.numel()).reshape(e.shape).cos()).sum() for e in embeddings)
        gradients.append(torch.autograd.grad(total, list(encoder.parameters()), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [2, -2, 0.5, torch.nan], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["sams", "another"])
def test_an_unknown_label_makes_its_prompt_nan(encoder, label, own):
    if not own:
        encoder.register_forward_hook(lambda module, arguments, output: None)
    given = prompts("points", label_dtype=torch.float32)
    expected = encode_prompts(encoder, **given)[0]
    given["labels"] = given["labels"].clone()
    given["labels"][1, 0] = label
    sparse, _ = encode_prompts(encoder, **given)
    assert sparse[1, 0].isnan().all()
    assert torch.equal(sparse[[0, 2]], expected[[0, 2]])


def test_a_byte_of_255_is_no_padding(encoder):
    given = prompts("points", label_dtype=torch.uint8)
    given["labels"] = torch.full_like(given["labels"], 255)
    assert encode_prompts(encoder, **given)[0][:, :-1].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["points", "boxes", "masks"])
def test_what_is_not_finite_makes_its_prompt_nan(encoder, name, value):
    given = prompts("one-point-box-mask")
    given[name][1].view(-1)[0] = value
    sparse, dense = encode_prompts(encoder, **given)
    found = dense if name == "masks" else sparse
    assert found[1].isnan().any()
    assert found[[0, 2]].isfinite().all()


class ForeignEncoder(PromptEncoder):
    def _embed_points(self, points, labels, pad):
        return 2 * super()._embed_points(points, labels, pad)


def test_an_encoder_of_another_class_runs_its_own_forward(encoder):
    given = prompts("points-box-mask")
    encoder.__class__ = ForeignEncoder
    assert torch.equal(encode_prompts(encoder, **given)[0], sams_own(encoder, **given)[0])


@pytest.fixture(params=memo.Rule, ids=lambda rule: rule.value)
def rule(request, monkeypatch):
    """As on a CPU, by values, and as on a GPU, by identity."""
    if request.param is memo.Rule.IDENTITY:
        monkeypatch.setattr(memo, "rule_for", memo.rule_on_a_gpu)


def assert_as_converted_now(encoder):
    """Twice, since the second call may be answered from what the first has kept."""
    expected = deepcopy(encoder).float()
    side = encoder.input_image_size[0]
    given = {"points": torch.rand(2, 1, 2) * side, "labels": torch.ones(2, 1), "boxes": None}
    given["masks"] = torch.randn(2, 1, *encoder.mask_input_size)
    for _ in range(2):
        for one, other in zip(encode_prompts(encoder, **given), sams_own(expected, **given), strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)
        assert torch.equal(dense_pe(encoder, torch.bfloat16), expected.get_dense_pe().bfloat16())


def assign_bias(encoder):
    encoder.mask_downscaling[0].bias = nn.Parameter(torch.ones(4).half())


def swap_activation(encoder):
    encoder.mask_downscaling[2] = nn.ReLU()


CHANGES = {
    "in place": lambda encoder: encoder.point_embeddings[1].weight.mul_(2),
    "frequencies": lambda encoder: encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5),
    "another parameter": assign_bias,
    "another module": swap_activation,
    "a hook": lambda encoder: encoder.mask_downscaling.register_forward_hook(lambda module, arguments, output: -output),
    "another dtype": lambda encoder: encoder.bfloat16(),
    "full precision": lambda encoder: encoder.float(),
    "load_state_dict": lambda encoder: encoder.load_state_dict({n: 2 * t for n, t in encoder.state_dict().items()}),
    "trainable": lambda encoder: encoder.requires_grad_(True).point_embeddings[1].weight.data.mul_(2),
}


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_every_change_of_a_half_encoder_shows(encoder, change):
    encoder.half()
    assert_as_converted_now(encoder)
    change(encoder)
    assert_as_converted_now(encoder)


@pytest.mark.usefixtures("rule")
@torch.no_grad()
def test_another_image_size_shows(sam):
    sam.requires_grad_(False).half()
    assert_as_converted_now(sam.prompt_encoder)
    set_image_size(sam, 96)
    assert_as_converted_now(sam.prompt_encoder)


@pytest.mark.usefixtures("rule")
@torch.no_grad()
def test_a_half_encoder_is_converted_once(encoder):
    assert in_float32(encoder) is encoder
    encoder.half()
    converted = in_float32(encoder)
    assert in_float32(encoder) is converted
    assert dense_pe(encoder, torch.float16) is dense_pe(encoder, torch.float16)
    gc.collect()
    count = len(prompt_encoding._copies), len(prompt_encoding._encodings)
    copied = deepcopy(encoder)
    assert in_float32(copied) is not converted
    dense_pe(copied, torch.float16)
    assert (len(prompt_encoding._copies), len(prompt_encoding._encodings)) == (count[0] + 1, count[1] + 1)
    del copied
    gc.collect()
    assert (len(prompt_encoding._copies), len(prompt_encoding._encodings)) == count
