"""Inputs of `offset_head` for the tests of every backend: one named case a situation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sample_inputs import with_layout
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


def make_head_inputs(case: HeadCase, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Random inputs, the convolution's result of size 1; and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        return with_layout(tensor.to(dtype).to(device), case.layout)

    channels, size = case.channels, case.kernel_size
    inputs = {
        "features": normal(case.batch, channels, case.height, case.width),
        "depthwise_weight": normal(channels, 1, size, size) / size,
        "depthwise_bias": normal(channels),
        "norm_weight": normal(channels),
        "norm_bias": normal(channels),
        "pointwise_weight": normal(2, channels, 1, 1) * max(channels, 1) ** -0.5,
        "pointwise_bias": normal(2),
    }
    if case.layout == "strided":  # arithmetic made the weights dense
        inputs = {name: with_layout(tensor, case.layout) for name, tensor in inputs.items()}
    return inputs, normal(case.batch, 2, case.height, case.width)


def head_truth(inputs: dict[str, Tensor], eps: float, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's output and gradients in float64, for these very inputs."""
    doubles = {name: tensor.detach().double() for name, tensor in inputs.items()}
    return run_head(reference.offset_head, doubles, eps, grad_output.double())


def run_head(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], eps: float, grad_output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call ``function(*inputs, eps)`` and differentiate it in all."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(*leaves.values(), eps)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return output.detach(), dict(zip(leaves, gradients, strict=True))
