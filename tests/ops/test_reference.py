"""The reference against an independent truth: torch's own grid_sample, and numerical differentiation."""

import pytest
import torch
import torch.nn.functional as F
from sample_inputs import CASES, NAMES, Case, by_name, make_grad_output, make_inputs, output_and_gradients
from tolerances import FORWARD, Tolerance, assert_matches
from torch import Tensor

from stable_sam_cuda.ops import reference

# grid_sample has normalised coordinates, so 0 / 0 where a side is one pixel long, and no empty tensors.
COMPARABLE = [case for case in CASES if min(case.height, case.width) > 1 and min(case.batch, case.channels) > 0]


def grid_sample_chain(
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
) -> Tensor:
    """The same operation as a user of PyTorch writes it."""
    batch = max(t.shape[0] for t in (features, offsets, identity, alpha, amplitude) if t is not None)
    height, width = features.shape[2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=offsets.dtype), torch.arange(width, dtype=offsets.dtype), indexing="ij"
    )
    displacement = max_offset * torch.tanh(offsets)
    x = (columns + displacement[:, 0]).clamp(0, width - 1) * (2 / (width - 1)) - 1
    y = (rows + displacement[:, 1]).clamp(0, height - 1) * (2 / (height - 1)) - 1
    grid = torch.stack((x, y), dim=-1).expand(batch, -1, -1, -1)
    source = features.expand(batch, -1, -1, -1)
    output = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=True)
    if amplitude is not None:
        output = output * amplitude
    if alpha is not None:
        output = output * alpha[:, :1, None, None] + identity * alpha[:, 1:, None, None]
    return output


@pytest.mark.parametrize("case", COMPARABLE, ids=str)
def test_agrees_with_grid_sample_and_its_gradients(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    grad_output = make_grad_output(case, torch.float64)
    output, gradients = output_and_gradients(reference.deformable_sample, inputs, case.max_offset, grad_output)
    expected, expected_gradients = output_and_gradients(grid_sample_chain, inputs, case.max_offset, grad_output)
    # Un-normalising coordinates costs grid_sample some units in the last place.
    assert_matches("output", output, expected, Tolerance(1e-12, 1e-12))
    for name, gradient in gradients.items():
        if name == "offsets" and case.max_offset == 0:
            continue  # zero here; grid_sample divides by the same zero
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], Tolerance(1e-10, 1e-10))


@pytest.mark.parametrize("case", by_name("channel_amplitude", "max_offset_2.7", "one_features"), ids=str)
def test_first_and_second_derivatives_are_numerically_right(case: Case) -> None:
    small = Case(case.name, 2, 2, 3, 3, case.max_offset, amplitude=case.amplitude, broadcast=case.broadcast)
    inputs = make_inputs(small, torch.float64)
    there = [name for name in NAMES if inputs[name] is not None]

    def function(*tensors: Tensor) -> Tensor:
        arguments = {**inputs, **dict(zip(there, tensors, strict=True))}
        return reference.deformable_sample(*arguments.values(), small.max_offset)

    leaves = [inputs[name].requires_grad_() for name in there]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    (case,) = by_name("channel_amplitude")
    inputs = make_inputs(case, dtype)
    output = reference.deformable_sample(*inputs.values(), case.max_offset)
    doubles = [None if t is None else t.double() for t in inputs.values()]
    assert output.dtype == dtype
    assert_matches("output", output, reference.deformable_sample(*doubles, case.max_offset), FORWARD[dtype])
