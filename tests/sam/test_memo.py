"""What is kept between calls is seen to be stale, by values and as on a GPU by identity, which needs no GPU to try."""

import gc

import pytest
import torch
from torch import nn

from stable_sam_cuda.sam import memo
from stable_sam_cuda.sam.memo import Memo, Rule, Snapshot, rule_for, rule_on_a_gpu


@pytest.fixture
def layer():
    """Frozen; its weight is the first half of ``memory``."""
    layer = nn.Linear(96, 64).requires_grad_(False)
    layer.memory = torch.randn(128, 96)
    layer.weight.data = layer.memory[:64]
    return layer


def tensors_of(layer):
    return layer.weight, layer.bias


def assign_parameter(layer):
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)


def assign_data(layer, times=1):
    """The second time the new data may get the memory of the first."""
    for _ in range(times):
        layer.bias.data = layer.bias.data * 2


def move_in_its_memory(layer):
    layer.weight.data = layer.memory[64:]


def stride_otherwise(layer):
    layer.weight.data = layer.memory[:64].flatten().unflatten(0, (96, 64)).t()


def optimise(layer, **options):
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    layer(torch.randn(2, 96)).square().sum().backward()
    optimizer.step()
    layer.requires_grad_(False)


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.mul_(2)


def swap(layer):
    torch.utils.swap_tensors(layer.bias, nn.Parameter(layer.bias * 2, requires_grad=False))


def load(layer, **options):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, **options)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "in place, detached": lambda layer: layer.bias.detach().zero_(),
    "in place, in inference mode": in_inference_mode,
    "in place, many": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "another parameter": assign_parameter,
    "other data": assign_data,
    "other data twice": lambda layer: assign_data(layer, times=2),
    "another place in its memory": move_in_its_memory,
    "other strides": stride_otherwise,
    "swapped": swap,
    "half and back": lambda layer: layer.half().float(),
    "another dtype": lambda layer: layer.double(),
    "load_state_dict": load,
    "load_state_dict, assigned": lambda layer: load(layer, assign=True),
    "an optimiser": optimise,
    "an optimiser, foreach": lambda layer: optimise(layer, foreach=True),
}


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.value)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(layer, change, rule):
    snapshot = Snapshot(tensors_of(layer), rule)
    assert snapshot.holds(tensors_of(layer), rule)
    change(layer)
    assert not snapshot.holds(tensors_of(layer), rule)


def write_through_data(layer):
    layer.weight.data.mul_(2)


def optimise_fused(layer):
    optimise(layer, fused=True)


@pytest.mark.parametrize("change", [write_through_data, optimise_fused])
def test_writes_that_pytorch_does_not_count_are_seen_by_value(layer, change):
    by_value = Snapshot(tensors_of(layer), Rule.VALUES)
    change(layer)
    assert not by_value.holds(tensors_of(layer), Rule.VALUES)


def test_the_rule_is_by_device(layer):
    assert rule_for(tensors_of(layer)) is rule_for(tensors_of(layer.requires_grad_(True))) is Rule.VALUES
    assert rule_for(tensors_of(layer.to("meta"))) is None


def test_on_a_gpu_some_weights_are_not_kept(layer, monkeypatch):
    assert rule_on_a_gpu(tensors_of(layer)) is Rule.IDENTITY
    with torch.inference_mode():
        assert rule_on_a_gpu(tensors_of(nn.Linear(2, 2).requires_grad_(False))) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        assert (rule_on_a_gpu(tensors_of(layer)) is None) == capturing
    layer.bias.requires_grad_(True)
    assert rule_on_a_gpu(tensors_of(layer)) is None


def test_another_stream_computes_for_itself(layer, monkeypatch):
    snapshot = Snapshot(tensors_of(layer), Rule.IDENTITY)
    monkeypatch.setattr(memo, "_stream_of", lambda tensors: 1)
    assert not snapshot.holds(tensors_of(layer), Rule.IDENTITY)


@pytest.fixture(params=Rule, ids=lambda rule: rule.value)
def rule(request, monkeypatch):
    """By which the memo goes, whatever the device."""
    if request.param is Rule.IDENTITY:
        monkeypatch.setattr(memo, "rule_for", rule_on_a_gpu)
    return request.param


def asked(kept, layer, key="key"):
    return kept.get(layer, key, tensors_of(layer), lambda: layer.weight.sum())


@pytest.mark.usefixtures("rule")
def test_a_value_is_kept_for_its_key_and_weights(layer):
    kept = Memo()
    first = asked(kept, layer)
    assert asked(kept, layer) is first
    other = asked(kept, layer, "another key")
    assert other is not first
    layer.weight.mul_(2)
    assert torch.equal(asked(kept, layer, "another key"), 2 * other)


@pytest.mark.usefixtures("rule")
def test_what_inference_mode_computes_serves_training(layer):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        value = Memo().get(layer, None, tensors_of(layer), lambda: layer(torch.ones(1, 96)))
    assert not value.is_inference()
    assert value.dtype == torch.float32


def test_training_drops_what_was_kept(layer, rule):
    """A fused optimiser leaves no trace on frozen weights, but for the call that saw them train."""
    kept = Memo()
    asked(kept, layer)
    layer.requires_grad_(True)
    trained = asked(kept, layer)
    assert len(kept) == (rule is Rule.VALUES)
    assert trained.requires_grad == (rule is Rule.IDENTITY)
    optimise_fused(layer)
    assert torch.equal(asked(kept, layer), layer.weight.sum())


@pytest.mark.usefixtures("rule")
def test_nothing_outlives_its_module(layer):
    kept, other = Memo(), nn.Linear(96, 64).requires_grad_(False)
    asked(kept, layer)
    asked(kept, other)
    del other
    gc.collect()
    assert len(kept) == 1
