"""Inputs of `offset_head` for the tests of every backend: one named case a situation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sample_inputs import with_layout
from tolerances import (
    BACKWARD,
    FORWARD,
    HEAD_CONVOLVED,
    HEAD_CONVOLVED_IN_NORM,
    Tolerance,
    assert_matches,
)
from torch import Tensor

from stable_sam_cuda.ops import reference

HEAD_NAMES = (
    "features",
    "depthwise_weight",
    "depthwise_bias",
    "norm_weight",
    "norm_bias",
    "pointwise_weight",
    "pointwise_bias",
)
CONVOLVED = ("features", "depthwise_weight")  # whose gradients are sums of rounded numbers


@dataclass(frozen=True)
class HeadCase:
    """Sizes and form of one call."""

    name: str
    batch: int = 2
    channels: int = 8
    height: int = 5
    width: int = 7
    kernel_size: int = 5
    eps: float = 1e-6
    layout: str = "channels_last"  # or "contiguous", "strided"

    def __str__(self) -> str:
        return self.name


def make_head_inputs(
    case: HeadCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0, normalised: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Random inputs, and the gradient of the output; ``normalised``: both convolutions' results have size 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        return with_layout(tensor.to(dtype).to(device), case.layout)

    channels, size = case.channels, case.kernel_size
    inputs = {
        "features": normal(case.batch, channels, case.height, case.width),
        "depthwise_weight": normal(channels, 1, size, size),
        "depthwise_bias": normal(channels),
        "norm_weight": normal(channels),
        "norm_bias": normal(channels),
        "pointwise_weight": normal(2, channels, 1, 1),
        "pointwise_bias": normal(2),
    }
    if normalised:
        factors = {"depthwise_weight": 1 / size, "pointwise_weight": max(channels, 1) ** -0.5}
        inputs |= {name: with_layout(inputs[name] * factor, case.layout) for name, factor in factors.items()}
    return inputs, normal(case.batch, 2, case.height, case.width)


def head_truth(inputs: dict[str, Tensor], eps: float, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's output and gradients in float64, for these very inputs."""
    doubles = {name: tensor.detach().double() for name, tensor in inputs.items()}
    return run_and_differentiate(reference.offset_head, doubles, eps, grad_output.double())


def run_and_differentiate(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], eps: float, grad_output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call ``function(*inputs, eps)`` and differentiate it in all."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(*leaves.values(), eps)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def assert_head_matches(
    name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype, units_in_last_place: float = 1.0
) -> None:
    """Every element by one tolerance; by a much closer one the whole, where it is a sum of rounded numbers.

    ``name`` is "output" or that of the input whose gradient it is. ``units_in_last_place``: 2 where the dtype is cut
    off instead of rounded.
    """
    table = FORWARD if name == "output" else HEAD_CONVOLVED if name in CONVOLVED else BACKWARD
    assert_matches(name, actual, truth, Tolerance(*[units_in_last_place * limit for limit in table[dtype]]))
    if name in CONVOLVED and truth.numel() >= 100:
        truth = truth.double()
        error = ((actual.double() - truth).norm() / truth.norm()).item()
        limit = units_in_last_place * HEAD_CONVOLVED_IN_NORM[dtype]
        assert error <= limit, f"{name}: relative error {error} in the norm"
