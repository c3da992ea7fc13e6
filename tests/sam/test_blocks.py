"""A plugin that joins both two-way blocks: installing, saving, and the first block's sampling, done once an image."""

import pytest
import torch
from decoder_inputs import encoded
from tolerances import DECODER, assert_matches

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import (
    plugin_of,
    plugin_state_dict,
    samplers_of,
    save_plugin,
    shared_decoder,
    stabilize,
    unstabilize,
)
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, SINGLE_MASK, decode
from stable_sam_cuda.sam.shared_sampling import share_sampling

SIZES = {
    "default": {},
    "no-router": {"router_hidden": 0},
    "location": {"amplitude": "location"},
    "channel": {"amplitude": "channel", "max_offset": 1.5},
}


@pytest.fixture
def both(sam, perturb):
    for seed, sampler in enumerate(samplers_of(stabilize(sam, blocks=2))):
        perturb(sampler, scale=0.05, seed=seed)
    return sam


@pytest.fixture
def shared(monkeypatch):
    """Counts how often the first block's sampling is done for all prompts at once."""
    calls = []
    monkeypatch.setattr(
        shared_decoder, "share_sampling", lambda *arguments: (calls.append(1), share_sampling(*arguments))[1]
    )
    return calls


def sams_own(sam, image, sparse, dense):
    dtype = next(sam.mask_decoder.parameters()).dtype
    tensors = (tensor.to(dtype) for tensor in (image, sam.prompt_encoder.get_dense_pe(), sparse, dense))
    return sam.mask_decoder.predict_masks(*tensors)


def assert_same(found, expected, dtype):
    for name, one, other in zip(("logits", "scores"), found, expected, strict=True):
        assert_matches(name, one, other, DECODER[dtype])


@torch.no_grad()
def test_an_untrained_plugin_in_both_blocks_leaves_sams_results(sam):
    inputs = encoded(sam, "box")
    expected = sams_own(sam, *inputs)
    assert_same(decode(stabilize(sam, blocks=2), *inputs, ALL_MASKS), expected, torch.float32)


def test_samplers_are_those_of_the_blocks_in_their_order(sam):
    layers = stabilize(sam, blocks=2).mask_decoder.transformer.layers
    assert samplers_of(sam) == (layers[0].plugin, layers[1].plugin)
    assert plugin_of(sam) is layers[1].plugin
    trained = [name for name, parameter in sam.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(plugin_state_dict(sam)) == 2 * len(plugin_of(sam).state_dict())
    unstabilize(sam)
    assert samplers_of(sam) == ()
    assert not any("plugin" in name for name in sam.state_dict())
    assert all(parameter.requires_grad for parameter in sam.parameters())


def test_the_papers_plugin_joins_the_last_block(sam):
    first, last = stabilize(sam).mask_decoder.transformer.layers
    assert samplers_of(sam) == (last.plugin,)
    assert not hasattr(first, "plugin")


@torch.no_grad()
def test_a_saved_plugin_goes_into_the_blocks_it_came_from(both, build_small_sam, tmp_path):
    path = tmp_path / "plugin.safetensors"
    save_plugin(both, path)
    torch.manual_seed(0)
    other = stabilize(build_small_sam(), path)
    assert len(samplers_of(other)) == 2
    inputs = encoded(both, "box")
    assert_same(decode(other, *inputs, ALL_MASKS), decode(both, *inputs, ALL_MASKS), torch.float32)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_the_first_block_samples_once_for_many_prompts(sam, perturb, shared, sizes, dtype):
    stabilize(sam, [perturb(DeformableSampler(**sizes), scale=0.05, seed=seed) for seed in (1, 2)])
    sam.mask_decoder.to(dtype)
    inputs = encoded(sam, "one-point", count=5)
    assert_same(decode(sam, *inputs, ALL_MASKS), sams_own(sam, *inputs), dtype)
    assert shared == [1]


@torch.no_grad()
def test_few_prompts_and_hooked_plugins_are_sampled_each(both, shared):
    decode(both, *encoded(both, "one-point", count=1), SINGLE_MASK)
    assert not shared
    inputs = encoded(both, "one-point", count=5)
    samplers_of(both)[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(decode(both, *inputs, ALL_MASKS), sams_own(both, *inputs), torch.float32)
    assert not shared


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": 3}, ValueError, "blocks: expected 1 to 2, the two-way blocks of SAM's decoder, got 3"),
        ({"blocks": 0}, ValueError, "blocks: expected at least 1, got 0"),
        ({"blocks": True}, TypeError, "blocks: expected an integer, got True"),
        ({"plugin": DeformableSampler(), "blocks": 1}, ValueError, "blocks: expected None beside a plugin"),
        ({"plugin": [DeformableSampler() for _ in range(3)]}, ValueError, "blocks: expected 1 to 2, .* got 3"),
        ({"plugin": [DeformableSampler(8), DeformableSampler(8)]}, ValueError, "plugin: expected channels=256"),
    ],
    ids=["too-many", "none", "boolean", "beside-a-plugin", "too-many-samplers", "channels"],
)
def test_what_does_not_fit_is_refused_and_leaves_sam_alone(sam, arguments, error, message):
    names = list(sam.state_dict())
    with pytest.raises(error, match=message):
        stabilize(sam, **arguments)
    assert list(sam.state_dict()) == names
    assert samplers_of(sam) == ()
    assert all(parameter.requires_grad for parameter in sam.parameters())
