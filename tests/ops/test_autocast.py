"""Autocast: inputs of every operation are cast to its dtype, before an op is called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import AttentionCase, attention_weights, make_attention_inputs
from head_cases import HeadCase, make_head_inputs
from sample_inputs import by_name, make_inputs
from torch import Tensor

from stable_sam_cuda import deformable_attention, deformable_sample, offset_head
from stable_sam_cuda.ops.autocast import autocast_dtype, cast_for_autocast

OPERATIONS = torch.ops.stable_sam_cuda
LOW = [torch.bfloat16, torch.float16]


def sample_inputs() -> dict[str, Tensor]:
    (case,) = by_name("channel_amplitude")
    return make_inputs(case, torch.float32)


def head_inputs() -> dict[str, Tensor]:
    inputs, _ = make_head_inputs(HeadCase("autocast"), torch.float32, normalised=True)
    return inputs


def attention_inputs() -> dict[str, Tensor]:
    inputs, _ = make_attention_inputs(AttentionCase("autocast"), torch.float32)
    return {"queries": inputs.pop("query_rows"), **inputs, **attention_weights(channels=8, inner=4)}


# Operation -> the public function, its tensors, its numbers, and the op that it is to call.
CALLS = {
    "deformable_sample": (deformable_sample, sample_inputs, {"max_offset": 1.5}, OPERATIONS.deformable_sample),
    "offset_head": (offset_head, head_inputs, {}, OPERATIONS.offset_head),
    "deformable_attention": (
        deformable_attention,
        attention_inputs,
        {"max_offset": 1.5, "num_heads": 2},
        OPERATIONS.sampled_attention,
    ),
}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_gives_its_dtype_and_gradients_in_their_own(name: str, backend: str, dtype: torch.dtype) -> None:
    function, inputs_of, numbers, _ = CALLS[name]
    inputs = inputs_of()
    inputs["features"] = inputs["features"].to(dtype)  # as a convolution under autocast returns them
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast("cpu", dtype=dtype):
        output = function(**leaves, **numbers, backend=backend)
    assert output.dtype == dtype
    output.sum().backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())


# Products of plain PyTorch heed autocast themselves: there the inputs are not all that is rounded.
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("name", "backend"), [("deformable_sample", "cpu"), ("deformable_sample", "reference"), ("offset_head", "cpu")]
)
def test_autocast_rounds_the_inputs_and_nothing_else(name: str, backend: str, dtype: torch.dtype) -> None:
    function, inputs_of, numbers, _ = CALLS[name]
    inputs = inputs_of()
    with torch.autocast("cpu", dtype=dtype):
        output = function(**inputs, **numbers, backend=backend)
    rounded = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    assert torch.equal(output, function(**rounded, **numbers, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_leaves_float64_alone(name: str, backend: str) -> None:
    function, inputs_of, numbers, _ = CALLS[name]
    inputs = {name: tensor.double() for name, tensor in inputs_of().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = function(**inputs, **numbers, backend=backend)
    assert output.dtype == torch.float64
    assert torch.equal(output, function(**inputs, **numbers, backend=backend))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_casts_are_traced_in_front_of_the_op(name: str, dtype: torch.dtype) -> None:
    """In the graph, where torch.compile's cache sees them: autocast's own cast within the op it would not see."""
    function, inputs_of, numbers, operation = CALLS[name]
    inputs, graphs = inputs_of(), []

    def keep(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=dtype):
        torch.compile(lambda: function(**inputs, **numbers, backend="cpu"), backend=keep, fullgraph=True)()
    (graph,) = graphs
    (call,) = [node for node in graph.nodes if node.target in (operation, operation.default)]
    tensors = [argument for argument in call.args if isinstance(argument, torch.fx.Node)]
    assert len(tensors) == len(operation.default._schema.arguments) - 1, "all but the number"
    for tensor in tensors:
        assert (tensor.target, tensor.args[1:]) == ("to", (dtype,)), tensor


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_op_itself_heeds_autocast(name: str, dtype: torch.dtype) -> None:
    """For those who call ``torch.ops.stable_sam_cuda`` themselves."""
    (case,) = by_name("channel_amplitude")
    inputs = {
        "deformable_sample": lambda: [*sample_inputs().values(), case.max_offset],
        "offset_head": lambda: [*head_inputs().values(), 1e-6],
        "deformable_attention": lambda: [*make_attention_inputs(AttentionCase("op"), torch.float32)[0].values(), 1.5],
    }[name]()
    operation = CALLS[name][-1]
    with torch.autocast("cpu", dtype=dtype):
        found = operation(*inputs)
    expected = operation(*[value.to(dtype) if isinstance(value, Tensor) else value for value in inputs])
    for one, other in zip(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_without_autocast_inputs_are_as_they_came() -> None:
    inputs = (torch.zeros(2, dtype=torch.float16), None, torch.zeros(2), 1.0)
    assert cast_for_autocast(inputs) is inputs
    assert autocast_dtype(inputs[0]) is torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, nothing, last, number = cast_for_autocast(inputs)
    assert (first.dtype, nothing, last.dtype, number) == (torch.bfloat16, None, torch.bfloat16, 1.0)


COMPILED_TWICE = """
import sys, torch
from stable_sam_cuda import deformable_sample

features, offsets = torch.randn(1, 8, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4, requires_grad=True)
for dtype in (torch.float16, torch.bfloat16):
    torch._dynamo.reset()
    sample = torch.compile(lambda *tensors: deformable_sample(*tensors, max_offset=2.0).float(), fullgraph=True)
    with torch.autocast("cpu", dtype=dtype):
        found, expected = sample(features, offsets), deformable_sample(features, offsets, max_offset=2.0)
    assert torch.equal(found, expected.float()), f"compiled for {dtype}: off by {(found - expected).abs().max()}"
    found.sum().backward()
"""


@pytest.mark.slow
def test_a_compiled_graph_is_not_taken_for_that_of_another_dtype(tmp_path: Path) -> None:
    """Without the casts torch 2.11 finds float16's graph in its cache where bfloat16 is asked for."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    command = [sys.executable, "-c", COMPILED_TWICE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
