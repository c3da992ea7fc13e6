"""Inputs of `sampled_attention` for the tests of every backend: one named case a situation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from sample_inputs import Case, make_inputs, with_layout
from tolerances import ATTENTION, ATTENTION_IN_NORM, Tolerance, assert_matches
from torch import Tensor

from stable_sam_cuda.ops import reference

ATTENTION_NAMES = ("query_rows", "features", "identity", "offsets", "alpha", "key_pe")


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and form of one call; ``broadcast`` names the arguments of batch 1."""

    name: str
    batch: int = 2
    rows: int = 5
    channels: int = 8
    height: int = 3
    width: int = 5
    max_offset: float = 1.5
    broadcast: frozenset[str] = field(default_factory=frozenset)
    layout: str = "channels_last"  # or "contiguous", "strided"

    def __str__(self) -> str:
        return self.name


def make_attention_inputs(
    case: AttentionCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Random inputs whose logits are of size 1 to 5, sampling away from integers; and the gradient of the output."""
    sampled = Case(
        case.name,
        case.batch,
        case.channels,
        case.height,
        case.width,
        case.max_offset,
        broadcast=case.broadcast,
        layout=case.layout,
    )
    generator = torch.Generator().manual_seed(seed + 100)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        return with_layout(tensor.to(dtype).to(device), case.layout)

    inputs = make_inputs(sampled, dtype, device, seed)
    key_pe_batch = 1 if "key_pe" in case.broadcast else case.batch
    rows_of_unit_logits = normal(case.batch, case.rows, case.channels) * max(case.channels, 1) ** -0.5
    inputs["query_rows"] = with_layout(rows_of_unit_logits, case.layout)
    inputs["key_pe"] = normal(key_pe_batch, case.channels, case.height, case.width)
    return {name: inputs[name] for name in ATTENTION_NAMES}, normal(case.batch, case.rows, case.channels)


def attention_weights(channels: int, inner: int, seed: int = 0) -> dict[str, Tensor]:
    """Random projections of `deformable_attention`."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in "qkv":
        shapes |= {f"{name}_weight": (inner, channels), f"{name}_bias": (inner,)}
    shapes |= {"out_weight": (channels, inner), "out_bias": (channels,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def attention_truth(
    inputs: dict[str, Tensor], max_offset: float, grad_pooled: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The reference's output, logsumexp and gradients in float64, for these very inputs."""
    doubles = {name: tensor.detach().double() for name, tensor in inputs.items()}
    return attend_and_differentiate(reference.sampled_attention, doubles, max_offset, grad_pooled.double())


def attend_and_differentiate(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], max_offset: float, grad_pooled: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Call ``function(*inputs, max_offset)`` and differentiate its first result in all."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    pooled, logsumexp = function(*leaves.values(), max_offset)
    gradients = torch.autograd.grad(pooled, list(leaves.values()), grad_pooled)
    return pooled.detach(), logsumexp.detach(), dict(zip(leaves, gradients, strict=True))


def assert_attention_matches(
    name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype, units_in_last_place: float = 1.0
) -> None:
    """Every element by one tolerance; by a much closer one the whole, where there are elements enough for a mean.

    ``units_in_last_place``: 2 where the dtype is cut off instead of rounded.
    """
    assert_matches(name, actual, truth, Tolerance(*[units_in_last_place * limit for limit in ATTENTION[dtype]]))
    if truth.numel() >= 100:
        truth = truth.double()
        error = ((actual.double() - truth).norm() / truth.norm()).item()
        assert error <= units_in_last_place * ATTENTION_IN_NORM[dtype], f"{name}: relative error {error} in the norm"
