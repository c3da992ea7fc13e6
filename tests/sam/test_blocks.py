"""A plugin that both two-way blocks share: installing, saving, and the first block's sampling, done once an image."""

from copy import deepcopy

import pytest
import torch
from decoder_inputs import assert_same_answers, encoded, sams_own

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.evaluation.protocol import recorded_routing
from stable_sam_cuda.sam import plugin_of, plugin_state_dict, save_plugin, shared_decoder, stabilize, unstabilize
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
    return stabilize(sam, perturb(DeformableSampler(blocks=2), scale=0.05))


@pytest.fixture
def shared(monkeypatch):
    """Counts how often the first block's sampling is done for all prompts at once."""
    calls = []
    monkeypatch.setattr(
        shared_decoder, "share_sampling", lambda *arguments: (calls.append(1), share_sampling(*arguments))[1]
    )
    return calls


@torch.no_grad()
def test_an_untrained_plugin_in_both_blocks_leaves_sams_results(sam):
    inputs = encoded(sam, "box")
    expected = sams_own(sam, *inputs)
    assert_same_answers(
        decode(stabilize(sam, DeformableSampler(blocks=2)), *inputs, ALL_MASKS), expected, torch.float32
    )


@torch.no_grad()
def test_a_trained_one_acts_in_both(sam, both, perturb):
    inputs = encoded(both, "box")
    found = decode(both, *inputs, ALL_MASKS)[0]
    in_last = perturb(DeformableSampler(), scale=0.05)
    expected = decode(stabilize(unstabilize(sam), in_last), *inputs, ALL_MASKS)[0]
    # Rounding is some 1e-6 of the largest logit.
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


def test_blocks_share_one_plugin_that_sam_has_once(sam):
    names = list(sam.state_dict())
    first, last = stabilize(sam, DeformableSampler(blocks=2)).mask_decoder.transformer.layers
    assert first.plugin is last.plugin is plugin_of(sam)
    added = [name for name in sam.state_dict() if name not in names]
    assert added == ["mask_decoder.transformer.layers.1.plugin." + name for name in plugin_state_dict(sam)]
    assert [name for name, parameter in sam.named_parameters() if parameter.requires_grad] == added
    unstabilize(sam)
    assert list(sam.state_dict()) == names
    assert not hasattr(first, "plugin")
    assert not hasattr(last, "plugin")
    assert all(parameter.requires_grad for parameter in sam.parameters())


def test_a_copy_shares_its_own_plugin(both):
    first, last = deepcopy(both).double().mask_decoder.transformer.layers
    assert first.plugin is last.plugin is not plugin_of(both)
    assert first.plugin.router.scale.dtype == torch.float64


def test_the_papers_plugin_joins_the_last_block(sam):
    first, _ = stabilize(sam).mask_decoder.transformer.layers
    assert not hasattr(first, "plugin")


@torch.no_grad()
def test_a_saved_plugin_goes_into_the_blocks_it_came_from(both, tmp_path):
    path, inputs = tmp_path / "plugin.safetensors", encoded(both, "box")
    save_plugin(both, path)
    expected = decode(both, *inputs, ALL_MASKS)
    other = stabilize(unstabilize(both), path)
    assert plugin_of(other).blocks == 2
    assert_same_answers(decode(other, *inputs, ALL_MASKS), expected, torch.float32)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_the_first_block_samples_once_for_many_prompts(sam, perturb, shared, sizes, dtype):
    stabilize(sam, perturb(DeformableSampler(**sizes, blocks=2), scale=0.05))
    sam.mask_decoder.to(dtype)
    inputs = encoded(sam, "one-point", count=5)
    assert_same_answers(decode(sam, *inputs, ALL_MASKS), sams_own(sam, *inputs), dtype)
    assert shared == [1]


@torch.no_grad()
def test_few_prompts_and_hooked_plugins_are_sampled_each(both, shared):
    decode(both, *encoded(both, "one-point", count=1), SINGLE_MASK)
    assert not shared
    inputs = encoded(both, "one-point", count=5)
    plugin_of(both).register_forward_hook(lambda module, args, output: 2 * output)
    assert_same_answers(decode(both, *inputs, ALL_MASKS), sams_own(both, *inputs), torch.float32)
    assert not shared


@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_the_last_blocks_routing_is_recorded(both, count):
    inputs = encoded(both, "one-point", count=count)
    chosen = []
    hook = plugin_of(both).router.register_forward_hook(lambda module, args, alpha: chosen.append(alpha[:, 0].mean()))
    with recorded_routing(both) as record:
        decode(both, *inputs, SINGLE_MASK)
    hook.remove()
    first, last = chosen
    assert first != last
    assert record.take() == pytest.approx(last.item())


def test_more_blocks_than_sam_has_are_refused_and_leave_it_alone(sam):
    names = list(sam.state_dict())
    with pytest.raises(ValueError, match=r"plugin: expected one for 1 to 2 blocks, .*, got one for 3"):
        stabilize(sam, DeformableSampler(blocks=3))
    assert list(sam.state_dict()) == names
    assert all(parameter.requires_grad for parameter in sam.parameters())


@pytest.mark.parametrize(("blocks", "error"), [(0, ValueError), (True, TypeError), (1.0, TypeError)], ids=str)
def test_blocks_are_a_number_of_blocks(blocks, error):
    with pytest.raises(error, match="blocks: expected"):
        DeformableSampler(8, blocks=blocks)


def replica_of(network):
    """What `nn.DataParallel` makes of a module for another device, here with tensors of their own on the CPU."""
    modules = list(network.modules())
    places = {module: place for place, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, copy in zip(modules, copies, strict=True):
        for name, child in module._modules.items():
            if child is not None:
                setattr(copy, name, copies[places[child]])
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            setattr(copy, name, None if tensor is None else tensor.detach().clone())
    return copies[0]


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_replicas_for_other_devices_have_their_own_plugin(sam, perturb, blocks):
    stabilize(sam, perturb(DeformableSampler(blocks=blocks), scale=0.05))
    replica = replica_of(sam)
    own = {block.plugin for block in replica.mask_decoder.transformer.layers[-blocks:]}
    assert len(own) == 1 and own.isdisjoint({plugin_of(sam)})
    batch = [
        {"image": torch.rand(3, 128, 128) * 255, "original_size": (128, 128), "boxes": torch.tensor([[9.0, 9, 99, 80]])}
    ]
    for tensor in sam.parameters():
        tensor.add_(1)  # what the replica still shared with its model would tell
    found = replica(batch, False)[0]["low_res_logits"]
    for tensor in sam.parameters():
        tensor.sub_(1)
    assert torch.allclose(found, sam(batch, False)[0]["low_res_logits"], atol=1e-4)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_shared_plugin_is_loaded_from_its_one_place(both, assign):
    state = {name: tensor + 1 if "plugin" in name else tensor for name, tensor in both.state_dict().items()}
    other = stabilize(unstabilize(deepcopy(both)), DeformableSampler(blocks=2))
    other.load_state_dict(state, assign=assign)
    first, last = other.mask_decoder.transformer.layers
    assert first.plugin is last.plugin
    for name, tensor in plugin_state_dict(both).items():
        assert torch.equal(plugin_state_dict(other)[name], tensor + 1)


def test_weights_of_a_borrowed_plugin_are_missed_and_refused_by_name(both):
    state = both.state_dict()
    last = "mask_decoder.transformer.layers.1.plugin.offset_network.projection.bias"
    state[last.replace("layers.1", "layers.0")] = state.pop(last)
    with pytest.raises(RuntimeError, match=r"Missing key.*layers.1.plugin(.|\n)*Unexpected key.*layers.0.plugin"):
        both.load_state_dict(state)
