"""The compiled CPU kernels against the reference in float64: output and every gradient, on poisoned memory."""

import itertools
import os
import subprocess
import sys

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

from stable_sam_cuda import Backend, _extension, backends

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


def test_autograd_asks_for_no_gradient_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = by_name("channel_amplitude")
    inputs = make_inputs(case, torch.float32)
    masks = []
    real = OPERATIONS.deformable_sample_backward
    monkeypatch.setattr(
        OPERATIONS, "deformable_sample_backward", lambda *a: masks.append(a[-2]) or real(*a), raising=False
    )
    for wanted in itertools.combinations(NAMES, 2):
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        OPERATIONS.deformable_sample(*leaves.values(), case.max_offset).sum().backward()
        assert masks.pop() == sum(1 << NAMES.index(name) for name in wanted)
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


# Every bit pattern of a half type goes through the op unchanged where the weight of its pixel is 1.
ROUND_TRIP = """
import torch, stable_sam_cuda
from stable_sam_cuda import _extension
for dtype in (torch.float16, torch.bfloat16):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    features = bits.view(dtype).view(1, 2**16, 1, 1)
    output = stable_sam_cuda.deformable_sample(features, torch.zeros(1, 2, 1, 1, dtype=dtype), max_offset=0.0)
    finite = features.isfinite()
    assert torch.equal(output[finite], features[finite]), dtype
    assert output[~finite].isnan().all(), dtype  # infinity times the weight 0 of the other taps
    halved = torch.rand(1, 4099, 1, 1) * torch.logspace(-9, 5, 4099).view(1, -1, 1, 1)
    scaled = stable_sam_cuda.deformable_sample(
        torch.ones(1, 4099, 1, 1, dtype=dtype), torch.zeros(1, 2, 1, 1, dtype=dtype), max_offset=0.0,
        amplitude=halved.to(dtype), identity=halved.to(dtype), alpha=torch.tensor([[0.3, 0.7]], dtype=dtype))
    a, b = torch.tensor([0.3, 0.7], dtype=dtype).float()
    expected = (halved.to(dtype).float() * a + halved.to(dtype).float() * b).to(dtype)
    off = (scaled.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max().item()
    assert off <= 1, (dtype, off)
print(_extension.cpu_instruction_set())
"""


@pytest.mark.parametrize("limit, expected", [("default", {"baseline"}), ("avx512", {"baseline", "avx2", "avx512"})])
def test_half_types_convert_exactly_on_each_instruction_set(limit: str, expected: set[str]) -> None:
    done = _run(ROUND_TRIP, limit)
    assert done in expected


BASELINE = """
import sys
sys.path.insert(0, "tests")
import torch
from sample_inputs import by_name, make_grad_output, make_inputs, output_and_gradients, truth
from tolerances import BACKWARD, FORWARD, assert_matches
from stable_sam_cuda import _extension
for case in by_name("channel_amplitude", "33_channels", "max_offset_2.7", "no_prompts_one_image"):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
        expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
        output, gradients = output_and_gradients(
            torch.ops.stable_sam_cuda.deformable_sample, inputs, case.max_offset, grad_output)
        assert_matches("output", output, expected, FORWARD[dtype])
        for name, gradient in gradients.items():
            if name in ("features", "identity"):
                assert_matches(name, gradient, expected_gradients[name], BACKWARD[dtype])
print(_extension.cpu_instruction_set())
"""


def test_the_kernels_for_old_processors_match_the_reference() -> None:
    assert _run(BASELINE, "default") == "baseline"


def _run(code: str, capability: str) -> str:
    """Run Python with PyTorch's own limit on instruction sets; the last line it prints."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_the_instruction_set_in_use_is_known() -> None:
    assert _extension.cpu_instruction_set() in _extension.build_info()["libraries"]["_ops_cpu"]["instruction_sets"]
