import copy
import pickle

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling.transformer import TwoWayAttentionBlock

from stable_sam_cuda.sam import StableSamPredictor, plugin_of, stabilize, unstabilize
from stable_sam_cuda.sam.lite import new_sam_lite

PREFIX = "mask_decoder.transformer.layers.1.plugin."
PROMPTS = {
    "box": {"box": np.array([20, 15, 80, 75])},
    "point": {"point_coords": np.array([[50, 45]]), "point_labels": np.array([1])},
    "box-and-points": {
        "box": np.array([20, 15, 80, 75]),
        "point_coords": np.array([[50, 45], [5, 5]]),
        "point_labels": np.array([1, 0]),
    },
}


def decoder_inputs(sam, batch=2, tokens=3, seed=0):
    torch.manual_seed(seed)
    dim, (height, width) = sam.mask_decoder.transformer_dim, sam.prompt_encoder.image_embedding_size
    return {
        "image_embeddings": torch.randn(1, dim, height, width),
        "image_pe": sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": torch.randn(batch, tokens, dim),
        "dense_prompt_embeddings": torch.randn(batch, dim, height, width),
        "multimask_output": True,
    }


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("multimask", [True, False], ids=["three-masks", "one-mask"])
def test_untrained_plugin_leaves_sams_results(sam, picture, prompt, multimask):
    plain = SamPredictor(sam)
    plain.set_image(picture)
    expected_logits, expected_scores, expected_low = plain.predict(
        **prompt, multimask_output=multimask, return_logits=True
    )
    expected_masks, _, _ = plain.predict(**prompt, multimask_output=multimask)
    assert 0.01 < expected_masks.mean() < 0.99

    stable = StableSamPredictor(stabilize(sam))
    stable.set_image(picture)
    masks, scores, low = stable.predict(**prompt, multimask_output=multimask)
    logits, _, _ = stable.predict(**prompt, multimask_output=multimask, return_logits=True)
    np.testing.assert_array_equal(masks, expected_masks)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(low, expected_low, rtol=0, atol=1e-5)


def test_untrained_plugin_leaves_the_results_of_vit_b():
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    predictor = StableSamPredictor(sam)
    # The encoder, which stabilising does not touch, would take half a minute.
    predictor.features = torch.randn(1, 256, 64, 64)
    predictor.original_size, predictor.input_size, predictor.is_image_set = (96, 128), (768, 1024), True
    prompt = {"box": np.array([20, 15, 80, 75])}
    expected_logits, expected_scores, _ = predictor.predict(**prompt, return_logits=True)
    stabilize(sam)
    logits, scores, _ = predictor.predict(**prompt, return_logits=True)
    np.testing.assert_array_equal(logits > 0, expected_logits > 0)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5)


def test_untrained_plugin_leaves_the_results_of_sam_lite(picture):
    sam = new_sam_lite(image_size=128)
    predictor = StableSamPredictor(sam)
    predictor.set_image(picture)
    expected = predictor.predict(**PROMPTS["box"], return_logits=True)
    stabilize(sam)
    for found, wanted in zip(predictor.predict(**PROMPTS["box"], return_logits=True), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_plugin_reaches_the_masks_through_the_last_token_to_image_attention_alone(sam, perturb):
    inputs = decoder_inputs(sam)
    seen = {}

    def record(name):
        return lambda module, args, kwargs, output: seen.update({name: kwargs | {"args": args, "output": output}})

    first, last = sam.mask_decoder.transformer.layers
    recorded = {
        "first": first,
        "last": last,
        "token_to_image": last.cross_attn_token_to_image,
        "image_to_token": last.cross_attn_image_to_token,
        "norm4": last.norm4,
    }
    for name, module in recorded.items():
        module.register_forward_hook(record(name), with_kwargs=True)
    with torch.no_grad():
        plain_masks, _ = sam.mask_decoder(**inputs)
        plain_first = seen["first"]["output"]
        stabilize(sam)
        perturb(plugin_of(sam))
        stable_masks, _ = sam.mask_decoder(**inputs)

    assert not torch.allclose(stable_masks, plain_masks, atol=1e-3)
    for one, other in zip(seen["first"]["output"], plain_first, strict=True):
        assert torch.equal(one, other)
    keys, key_pe = seen["last"]["keys"], seen["last"]["key_pe"]
    calibrated = seen["token_to_image"]["v"]
    assert not torch.allclose(calibrated, keys, atol=1e-2)
    assert torch.equal(seen["token_to_image"]["k"], calibrated + key_pe)
    assert torch.equal(seen["image_to_token"]["q"], keys + key_pe)
    assert torch.equal(*seen["norm4"]["args"], keys + seen["image_to_token"]["output"])


def test_plugin_sees_the_image_in_place_and_the_first_mask_token_after_self_attention(sam):
    stabilize(sam)
    block = sam.mask_decoder.transformer.layers[-1]
    seen = {}
    block.norm1.register_forward_hook(lambda module, args, output: seen.update(tokens=output))
    block.register_forward_pre_hook(lambda module, args, kwargs: seen.update(keys=kwargs["keys"]), with_kwargs=True)
    block.plugin.register_forward_hook(lambda module, args, output: seen.update(plugin=args))
    with torch.no_grad():
        sam.mask_decoder(**decoder_inputs(sam))
    features, token = seen["plugin"]
    assert torch.equal(token, seen["tokens"][:, 1])
    assert features.data_ptr() == seen["keys"].data_ptr()
    assert features.is_contiguous(memory_format=torch.channels_last)
    side = sam.prompt_encoder.image_embedding_size[0]
    assert torch.equal(features[1, :, 2, 3], seen["keys"][1, 2 * side + 3])


def test_sam_stays_bit_identical_and_only_the_plugin_trains(sam):
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in sam.state_dict().items()}
    stabilize(sam)
    trainable = [name for name, parameter in sam.named_parameters() if parameter.requires_grad]
    assert trainable == [PREFIX + name for name, _ in plugin_of(sam).named_parameters()]
    plugin_before = copy.deepcopy(plugin_of(sam).state_dict())

    optimizer = torch.optim.Adam((p for p in sam.parameters() if p.requires_grad), lr=1e-2)
    inputs = decoder_inputs(sam)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sam.mask_decoder(**inputs)[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = sam.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert {name: after[name].data_ptr() for name in before} == addresses
    assert [name for name in after if name not in before] == [PREFIX + name for name in plugin_before]
    unmoved = [name for name, value in plugin_before.items() if torch.equal(value, after[PREFIX + name])]
    assert unmoved == []


def test_gradients_reach_every_parameter_of_the_plugin(sam, perturb):
    stabilize(sam)
    perturb(plugin_of(sam), scale=0.05)
    sam.mask_decoder(**decoder_inputs(sam))[0].square().mean().backward()
    dead = [name for name, p in plugin_of(sam).named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []
    assert [name for name, p in sam.named_parameters() if p.grad is not None and PREFIX not in name] == []


def test_unstabilize_restores_everything(sam, perturb):
    sam.image_encoder.requires_grad_(False)
    names = [name for name, _ in sam.named_modules()]
    state = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in sam.named_parameters()}
    attributes = set(vars(sam.mask_decoder.transformer.layers[-1]))
    inputs = decoder_inputs(sam)
    expected = sam.mask_decoder(**inputs)

    stabilize(sam)
    perturb(plugin_of(sam))
    assert unstabilize(sam) is sam
    assert type(sam.mask_decoder.transformer.layers[-1]) is TwoWayAttentionBlock
    assert set(vars(sam.mask_decoder.transformer.layers[-1])) == attributes
    assert [name for name, _ in sam.named_modules()] == names
    assert {name: parameter.requires_grad for name, parameter in sam.named_parameters()} == flags
    assert sam.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in sam.state_dict().items())
    for found, wanted in zip(sam.mask_decoder(**inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    stabilize(sam)


def through_pickle(sam):
    return pickle.loads(pickle.dumps(sam))


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
def test_clones_compute_the_same_and_unstabilize(sam, perturb, clone):
    plain = sam.mask_decoder(**decoder_inputs(sam))[0]
    stabilize(sam)
    perturb(plugin_of(sam))
    other = clone(sam)
    expected = sam.mask_decoder(**decoder_inputs(sam))[0]
    assert torch.equal(other.mask_decoder(**decoder_inputs(sam))[0], expected)
    unstabilize(other)
    assert torch.equal(other.mask_decoder(**decoder_inputs(sam))[0], plain)
    assert torch.equal(sam.mask_decoder(**decoder_inputs(sam))[0], expected)


def test_state_dict_round_trip_through_a_fresh_model(sam, perturb):
    other = copy.deepcopy(sam)
    stabilize(sam)
    perturb(plugin_of(sam))
    stabilize(other).load_state_dict(sam.state_dict())
    inputs = decoder_inputs(sam)
    assert torch.equal(other.mask_decoder(**inputs)[0], sam.mask_decoder(**inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_plugin_takes_the_decoders_dtype_and_sams_mode(sam, dtype):
    sam.mask_decoder.to(dtype)
    plugin = plugin_of(stabilize(sam))
    assert {parameter.dtype for parameter in plugin.parameters()} == {dtype}
    assert not plugin.training


def test_decoder_traces_as_one_graph(sam, perturb):
    stabilize(sam)
    perturb(plugin_of(sam))
    inputs = decoder_inputs(sam)
    with torch.no_grad():
        expected = sam.mask_decoder(**inputs)
        found = torch.compile(sam.mask_decoder, fullgraph=True, backend="aot_eager")(**inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_stable_block_compiles_to_machine_code(sam, perturb):
    block = stabilize(sam).mask_decoder.transformer.layers[-1]
    perturb(plugin_of(sam))
    queries, query_pe, keys, key_pe = (torch.randn(2, count, 256) for count in (8, 8, 64, 64))
    with torch.no_grad():
        expected = block(queries, keys, query_pe, key_pe)
        found = torch.compile(block, fullgraph=True)(queries, keys, query_pe, key_pe)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
