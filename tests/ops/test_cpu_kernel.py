"""The compiled CPU kernels against the reference in float64: output and every gradient, on poisoned memory."""

import itertools

import pytest
import torch
from sample_inputs import (
    CASES,
    NAMES,
    Case,
    by_name,
    make_grad_output,
    make_inputs,
    output_and_gradients,
    output_batch,
    truth,
)
from tolerances import BACKWARD, FORWARD, SUMMED_AFTER_ROUNDING, assert_matches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stable_sam_cuda import Backend, backends

pytestmark = pytest.mark.usefixtures("two_threads")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPERATIONS = torch.ops.stable_sam_cuda


def test_the_kernels_are_built() -> None:
    assert backends.why_unavailable(Backend.CPU) is None


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_reference(case: Case, dtype: torch.dtype) -> None:
    inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    output, gradients = output_and_gradients(OPERATIONS.deformable_sample, inputs, case.max_offset, grad_output)
    assert output.dtype == dtype
    assert_matches("output", output, expected, FORWARD[dtype])
    for name, gradient in gradients.items():
        summed_later = name not in ("features", "identity") and inputs[name].shape[0] != output_batch(case)
        table = SUMMED_AFTER_ROUNDING if summed_later else BACKWARD
        assert gradient.dtype == dtype
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], table[dtype])


@pytest.mark.parametrize("case", by_name("routed", "contiguous", "strided", "one_channel"), ids=str)
def test_results_have_the_promised_memory_format(case: Case) -> None:
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    output = OPERATIONS.deformable_sample(*inputs.values(), case.max_offset)
    gradients = OPERATIONS.deformable_sample_backward(grad_output, *inputs.values(), case.max_offset, 31, False)
    for name, tensor in {"output": output, "features": gradients[0], "identity": gradients[2]}.items():
        assert tensor.permute(0, 2, 3, 1).is_contiguous(), name
    assert gradients[1].is_contiguous()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("amplitude", ["pixel", "channel"])
@pytest.mark.parametrize(
    "grad_mask", range(32), ids=lambda mask: "+".join(n for b, n in enumerate(NAMES) if mask >> b & 1)
)
def test_only_gradients_asked_for_are_computed(grad_mask: int, amplitude: str) -> None:
    case = Case("asked", channels=12, amplitude=amplitude)
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    _, expected = truth(inputs, case.max_offset, grad_output)
    gradients = OPERATIONS.deformable_sample_backward(grad_output, *inputs.values(), case.max_offset, grad_mask, False)
    for bit, (name, gradient) in enumerate(zip(NAMES, gradients, strict=True)):
        if grad_mask >> bit & 1:
            assert_matches(f"grad_{name}", gradient, expected[name], BACKWARD[torch.float32])
        else:
            assert gradient.shape == (0,), name


class BackwardMasks(TorchDispatchMode):
    """Collects the ``grad_mask`` of every call of the backward op."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[int] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation is OPERATIONS.deformable_sample_backward.default:
            self.masks.append(arguments[-2])
        return operation(*arguments, **(options or {}))


def test_autograd_asks_for_no_gradient_that_nobody_needs() -> None:
    (case,) = by_name("channel_amplitude")
    inputs = make_inputs(case, torch.float32)
    for wanted in itertools.combinations(NAMES, 2):
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        with BackwardMasks() as seen:
            OPERATIONS.deformable_sample(*leaves.values(), case.max_offset).sum().backward()
        assert seen.masks == [sum(1 << NAMES.index(name) for name in wanted)]
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)


@pytest.mark.parametrize("case", by_name("channel_amplitude", "pixel_amplitude", "one_features"), ids=str)
def test_gradcheck(case: Case) -> None:
    small = Case(case.name, 2, 3, 3, 4, 1.7, amplitude=case.amplitude, broadcast=case.broadcast)
    inputs = make_inputs(small, torch.float64)
    there = [name for name in NAMES if inputs[name] is not None]

    def function(*tensors: Tensor) -> Tensor:
        arguments = {**inputs, **dict(zip(there, tensors, strict=True))}
        return OPERATIONS.deformable_sample(*arguments.values(), small.max_offset)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in there])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    case = Case("threads", batch=3, channels=40, height=17, width=11, max_offset=3.0, amplitude="pixel")
    inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            output, gradients = output_and_gradients(OPERATIONS.deformable_sample, inputs, case.max_offset, grad_output)
            results.append([output, *gradients.values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(first, again) for first, again in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
def test_large_outputs_take_the_path_around_the_caches() -> None:
    case = Case("large", batch=6, channels=256, height=56, width=56, max_offset=2.7)  # 19 MB, over memory.h's 16 MiB
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    output, gradients = output_and_gradients(OPERATIONS.deformable_sample, inputs, case.max_offset, grad_output)
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    assert_matches("output", output, expected, FORWARD[torch.float32])
    for name, gradient in gradients.items():
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], BACKWARD[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_is_exact_to_the_last_places(dtype: torch.dtype) -> None:
    """One row of pixels holding 0, 1, 2, sampled around the middle one: the output there is 1 + tanh(offset)."""
    raw = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-30, 0, 2001), torch.tensor([0.625, 88.0, 3e38])])
    offsets = torch.zeros(len(raw), 2, 1, 3, dtype=dtype)
    offsets[:, 0, 0, 1] = raw.to(dtype)
    offsets.requires_grad_()
    ramp = torch.tensor([0.0, 1.0, 2.0], dtype=dtype).view(1, 1, 1, 3)
    output = OPERATIONS.deformable_sample(ramp, offsets, None, None, None, 1.0)[:, 0, 0, 1]
    (gradient,) = torch.autograd.grad(output.sum(), offsets)
    exact = torch.tanh(offsets.detach()[:, 0, 0, 1].double())
    unit = torch.finfo(dtype).eps
    assert (output.double() - (1 + exact)).abs().max() <= 2 * unit
    inside = exact.abs() < 1 - unit  # beyond, the location is the border itself
    slopes = gradient[:, 0, 0, 1].double()
    assert (slopes - (1 - exact.square()))[inside].abs().max() <= 4 * unit
