"""`deformable_sample` and what PyTorch builds on it: opcheck, torch.compile, torch.export, determinism."""

from functools import partial

import numpy as np
import pytest
import torch
from sample_inputs import NAMES, Case, by_name, make_grad_output, make_inputs, output_and_gradients, truth
from tolerances import BACKWARD, FORWARD, assert_matches
from torch import Tensor

import stable_sam_cuda

OPERATIONS = torch.ops.stable_sam_cuda
OPCHECK_CASES = by_name(
    "plain", "channel_amplitude", "strided", "one_channel", "1x1", "all_but_offsets", "no_prompts", "no_rows"
)


def call(inputs: dict[str, Tensor | None], max_offset: float, **options: object) -> Tensor:
    features, offsets, *others = inputs.values()
    identity, alpha, amplitude = others
    return stable_sam_cuda.deformable_sample(
        features, offsets, identity=identity, alpha=alpha, amplitude=amplitude, max_offset=max_offset, **options
    )


def function(features, offsets, identity, alpha, amplitude, max_offset):  # type: ignore[no-untyped-def]
    """`deformable_sample` with the signature that `output_and_gradients` calls."""
    return call(dict(zip(NAMES, (features, offsets, identity, alpha, amplitude), strict=True)), max_offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_forward(case: Case, dtype: torch.dtype) -> None:
    inputs = [None if t is None else t.requires_grad_() for t in make_inputs(case, dtype).values()]
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if case.name == "channel_amplitude":  # tracing with dynamic shapes takes seconds a case
        utilities.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(OPERATIONS.deformable_sample.default, (*inputs, case.max_offset), test_utils=utilities)


@pytest.mark.parametrize("wanted", [(), ("offsets",), ("features", "alpha"), NAMES], ids="+".join)
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_backward(case: Case, wanted: tuple[str, ...]) -> None:
    inputs = make_inputs(case, torch.float32).values()
    grad_mask = sum(1 << NAMES.index(name) for name in wanted)
    torch.library.opcheck(
        OPERATIONS.deformable_sample_backward.default,
        (make_grad_output(case, torch.float32), *inputs, case.max_offset, grad_mask, False),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.slow
def test_compile_makes_one_graph_forward_and_backward() -> None:
    (case,) = by_name("channel_amplitude")
    compiled = torch.compile(function, fullgraph=True)
    for batch in (2, 3, 4):  # static, then once more with B made dynamic
        sized = Case("compiled", batch=batch, amplitude="channel")
        inputs, grad_output = make_inputs(sized, torch.float32), make_grad_output(sized, torch.float32)
        output, gradients = output_and_gradients(compiled, inputs, case.max_offset, grad_output)
        expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
        assert_matches("output", output, expected, FORWARD[torch.float32])
        for name, gradient in gradients.items():
            assert_matches(f"grad_{name}", gradient, expected_gradients[name], BACKWARD[torch.float32])


def test_export_keeps_the_operator() -> None:
    (case,) = by_name("channel_amplitude")
    inputs = make_inputs(case, torch.float32)

    class Sampler(torch.nn.Module):
        def forward(
            self, features: Tensor, offsets: Tensor, identity: Tensor, alpha: Tensor, amplitude: Tensor
        ) -> Tensor:
            return function(features, offsets, identity, alpha, amplitude, case.max_offset)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(Sampler(), tuple(inputs.values()), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert OPERATIONS.deformable_sample.default in targets
    larger = make_inputs(Case("larger", batch=5, amplitude="channel"), torch.float32)
    assert torch.equal(program.module()(*larger.values()), call(larger, case.max_offset))


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_gradients_are_bitwise_repeatable(deterministic: bool) -> None:
    case = Case(
        "collisions", batch=4, channels=16, height=6, width=6, max_offset=8.0, broadcast=frozenset({"features"})
    )
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = output_and_gradients(function, inputs, case.max_offset, grad_output)
        second = output_and_gradients(function, inputs, case.max_offset, grad_output)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_inference_mode_changes_nothing() -> None:
    (case,) = by_name("routed")
    inputs = make_inputs(case, torch.float32)
    with torch.inference_mode():
        output = call(inputs, case.max_offset)
    assert torch.equal(output, call(inputs, case.max_offset))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_choosing_a_backend_does_not_break_the_graph(backend: str) -> None:
    (case,) = by_name("routed")
    inputs = make_inputs(case, torch.float32)
    code = partial(call, max_offset=case.max_offset, backend=backend)
    compiled = torch.compile(code, fullgraph=True, backend="aot_eager")
    assert_matches(
        "output", compiled(inputs), call(inputs, case.max_offset, backend="reference"), FORWARD[torch.float32]
    )


@pytest.mark.parametrize("max_offset", [2, 2.0, np.float64(2)], ids=["int", "float", "numpy"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_number_is_a_displacement(backend: str, max_offset: float) -> None:
    (case,) = by_name("routed")
    inputs = make_inputs(case, torch.float32)
    leaves = {name: None if t is None else t.requires_grad_() for name, t in inputs.items()}
    output = call(leaves, max_offset, backend=backend)
    output.sum().backward()
    assert torch.equal(output, call(inputs, 2.0, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_identity_without_alpha_has_no_effect(backend: str) -> None:
    (case,) = by_name("routed")
    inputs = make_inputs(case, torch.float32) | {"alpha": None}
    poisoned = inputs | {"identity": torch.full_like(inputs["features"], torch.nan)}
    assert torch.equal(call(poisoned, 2.0, backend=backend), call(inputs | {"identity": None}, 2.0, backend=backend))
