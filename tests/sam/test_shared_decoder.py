"""The shared decoder against segment_anything's own: outputs and gradients, plain, stabilised, with other methods."""

from copy import deepcopy

import pytest
import torch
from decoder_inputs import assert_same_answers, encoded, sams_own
from segment_anything.modeling import MaskDecoder
from tolerances import DECODER_GRADIENTS, assert_matches

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.data.prompts import PromptBatch
from stable_sam_cuda.sam import plugin_of, stabilize
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, SINGLE_MASK, THREE_MASKS, decode
from stable_sam_cuda.training.methods import install_method
from stable_sam_cuda.training.step import decode_prompts

KINDS = ("one-point", "five-points", "twelve-points", "box", "box-and-points", "mask", "everything")


BLOCKS = {"plain": 0, "stabilised": 1, "both-blocks": 2}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def model(request, sam, perturb):
    if request.param:
        stabilize(sam, perturb(DeformableSampler(blocks=request.param), scale=0.05))
    return sam


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_answers_are_sams(model, kind, count, dtype):
    model.mask_decoder.to(dtype)
    inputs = encoded(model, kind, count)
    for masks in (SINGLE_MASK, THREE_MASKS, ALL_MASKS):
        assert_same_answers(decode(model, *inputs, masks), sams_own(model, *inputs, masks), dtype)


@torch.inference_mode()
def test_answers_are_sams_in_inference_mode(model):
    inputs = encoded(model, "box")
    assert_same_answers(decode(model, *inputs, ALL_MASKS), sams_own(model, *inputs), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_types_are_as_exact_as_sams_own(model, dtype):
    """Both round each step. Logits: half as much error again as SAM's own, by mean square over 12,288 of them. Scores,
    a dozen: eight units in the last place."""
    inputs = encoded(model, "box-and-points")
    model.mask_decoder.to(dtype)
    exact = deepcopy(model)
    exact.mask_decoder.double()
    found, own, truth = decode(model, *inputs, ALL_MASKS), sams_own(model, *inputs), sams_own(exact, *inputs)
    ours, theirs = ((answer[0].double() - truth[0]).square().mean() for answer in (found, own))
    assert ours <= 1.5**2 * theirs
    error = (found[1].double() - truth[1]).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * truth[1].square().mean().sqrt()


@torch.no_grad()
def test_under_autocast_it_is_as_exact_as_sams_own(model):
    inputs = encoded(model, "box-and-points")
    exact = sams_own(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found, own = decode(model, *inputs, ALL_MASKS), sams_own(model, *inputs)
    ours, theirs = ((answer[0].float() - exact[0]).square().mean() for answer in (found, own))
    assert 0 < ours <= 1.5**2 * theirs
    # What was kept from the call under autocast must not be in its dtype.
    assert_same_answers(decode(model, *inputs, ALL_MASKS), exact, torch.float32)


def gradients(answers, inputs, parameters):
    """Of a sum of all answers, each with its own factor, in inputs and parameters; zero where it does not reach."""
    generator = torch.Generator().manual_seed(3)
    total = sum((answer * torch.randn(answer.shape, generator=generator).to(answer)).sum() for answer in answers)
    found = torch.autograd.grad(total, [*inputs, *parameters], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, [*inputs, *parameters], strict=True)]


def assert_same_gradients(sam, inputs, masks=ALL_MASKS):
    """In all trainable parameters and in the image, sparse and dense embeddings."""
    parameters = {name: p for name, p in sam.mask_decoder.named_parameters() if p.requires_grad}
    dtype = next(sam.mask_decoder.parameters()).dtype
    image, sparse, dense = (tensor.to(dtype) for tensor in inputs)
    one_for_all = inputs[2].stride(0) == 0  # then the leaf is the one embedding, of which the prompts see views
    leaves = [image.requires_grad_(), sparse.requires_grad_(), (dense[:1] if one_for_all else dense).clone()]
    leaves[2].requires_grad_()
    given = [image, sparse, leaves[2].expand(len(sparse), -1, -1, -1)]
    found = gradients(decode(sam, *given, masks), leaves, parameters.values())
    expected = gradients(sams_own(sam, *given, masks), leaves, parameters.values())
    largest = max(gradient.abs().max() for gradient in expected if gradient.numel())
    for name, one, other in zip(["image", "sparse", "dense", *parameters], found, expected, strict=True):
        if other.numel() and other.abs().max() < 1e-9 * largest:  # zero but for rounding, as a key's bias has it
            assert one.abs().max() < 1e-9 * largest, name
        else:
            assert_matches(f"gradient of {name}", one, other, DECODER_GRADIENTS[one.dtype])
    assert parameters


@pytest.mark.parametrize("kind", ["one-point", "twelve-points", "mask"])
def test_gradients_of_all_parameters_are_sams(model, kind):
    model.mask_decoder.double().requires_grad_(True)
    assert_same_gradients(model, encoded(model, kind, count=2))


def test_gradients_of_the_plugin_are_sams(sam, perturb):
    perturb(plugin_of(stabilize(sam)), scale=0.05)
    sam.mask_decoder.double()
    assert_same_gradients(sam, encoded(sam, "box-and-points"))


def test_gradients_are_sams_in_float32(sam, perturb):
    perturb(plugin_of(stabilize(sam)), scale=0.05)
    assert_same_gradients(sam, encoded(sam, "box"), SINGLE_MASK)


@pytest.mark.parametrize("method", ["pt", "dt", "lora", "adapter"])
def test_baselines_keep_answers_and_gradients(sam, perturb, method):
    parameters = install_method(sam, method)
    sam.mask_decoder.double()
    if method in ("lora", "adapter"):
        perturb(torch.nn.ParameterList(parameters.values()), scale=0.05)
    inputs = encoded(sam, "box")
    assert_same_answers(decode(sam, *inputs, ALL_MASKS), sams_own(sam, *inputs), torch.float64)
    assert_same_gradients(sam, inputs)


@pytest.mark.parametrize("kind", ["one-point", "box-and-points", "mask"])
def test_prompts_of_several_pictures(model, kind):
    images = torch.cat([encoded(model, kind, seed=seed)[0] for seed in range(3)])
    index = torch.tensor([0, 0, 1, 2, 2])
    side, count = model.prompt_encoder.input_image_size[0], len(index)
    corners = torch.rand(count, 2) * side / 2
    prompts = PromptBatch(index)
    if "point" in kind:
        prompts.points, prompts.labels = torch.rand(count, 2, 2) * side, torch.ones(count, 2)
    if "box" in kind:
        prompts.boxes = torch.cat([corners, corners + side / 3], 1)
    if kind == "mask":
        prompts.masks = torch.randn(count, 1, *model.prompt_encoder.mask_input_size)
    logits, scores = decode_prompts(model, images, prompts)
    for place, picture in enumerate(index.tolist()):
        own = {n: None if t is None else t[place : place + 1] for n, t in vars(prompts).items() if n != "image_index"}
        points = None if own["points"] is None else (own["points"], own["labels"])
        sparse, dense = model.prompt_encoder(points=points, boxes=own["boxes"], masks=own["masks"])
        expected = sams_own(model, images[picture : picture + 1], sparse, dense)
        assert_same_answers((logits[place : place + 1], scores[place : place + 1]), expected, torch.float32)


def hookable(sam):
    decoder = sam.mask_decoder
    first, last = decoder.transformer.layers
    return {
        "decoder": decoder,
        "transformer": decoder.transformer,
        "first block": first,
        "last block": last,
        "attention": last.cross_attn_token_to_image,
        "image's attention": first.cross_attn_image_to_token,
        "projection": decoder.transformer.final_attn_token_to_image.k_proj,
        "upscaling": decoder.output_upscaling,
        "norm in the upscaling": decoder.output_upscaling[1],
        "hypernetwork": decoder.output_hypernetworks_mlps[0],
    }


@pytest.mark.parametrize("place", ["decoder", "transformer", "first block", "last block", "attention",
                                   "image's attention", "projection", "upscaling", "norm in the upscaling",
                                   "hypernetwork"])  # fmt: skip
@torch.no_grad()
def test_hooks_see_and_change_what_they_do_in_sam(model, place):
    inputs = encoded(model, "box")
    unhooked = decode(model, *inputs, SINGLE_MASK)[0]
    calls = []

    def scale(module, args, output):
        calls.append(1)
        return tuple(1.5 * part for part in output) if isinstance(output, tuple) else 1.5 * output

    hookable(model)[place].register_forward_hook(scale)
    found = decode(model, *inputs, SINGLE_MASK)
    assert len(calls) == 1
    arguments = dict(
        image_embeddings=inputs[0],
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=inputs[1],
        dense_prompt_embeddings=inputs[2],
        multimask_output=False,
    )
    assert_same_answers(found, model.mask_decoder(**arguments), torch.float32)
    assert not torch.allclose(found[0], unhooked, rtol=1e-2)


@pytest.mark.parametrize("place", ["attention", "image's attention", "upscaling"])
@torch.no_grad()
def test_layers_without_a_bias(model, place):
    module = hookable(model)[place]
    for name in ("k_proj", "v_proj", "out_proj", "0"):
        if name in module._modules:
            module.get_submodule(name).bias = None
    inputs = encoded(model, "box")
    assert_same_answers(decode(model, *inputs, ALL_MASKS), sams_own(model, *inputs), torch.float32)


class ForeignDecoder(MaskDecoder):
    """One that segment_anything does not know: its masks are its own."""

    def predict_masks(self, **arguments):
        logits, scores = super().predict_masks(**arguments)
        return 2 * logits, scores + 1


@torch.no_grad()
def test_a_decoder_of_another_class_runs_its_own_forward(sam):
    inputs = encoded(sam, "box")
    logits, scores = sams_own(sam, *inputs)
    sam.mask_decoder.__class__ = ForeignDecoder
    for masks in (SINGLE_MASK, THREE_MASKS, ALL_MASKS):
        expected = 2 * logits[:, list(masks)], scores[:, list(masks)] + 1
        assert_same_answers(decode(sam, *inputs, masks), expected, torch.float32)
    images = inputs[0].expand(3, -1, -1, -1)
    assert_same_answers(decode(sam, images, *inputs[1:], ALL_MASKS), (2 * logits, scores + 1), torch.float32)
