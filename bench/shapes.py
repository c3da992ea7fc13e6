"""Sizes that matter, and random inputs of those sizes: never zeros, whose offsets would all be integers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import Run
from torch import Tensor

HEADS = 8  # of SAM's decoder
INNER = 128  # channels of its attention to the image

Inputs = dict[str, Any]  # tensors, and max_offset
BATCHED = ("queries", "features", "projected", "offsets", "alpha")
PROJECTION = ("projection_weight", "projection_bias")
HEAD = tuple(f"{layer}_{kind}" for layer in ("depthwise", "norm", "pointwise") for kind in ("weight", "bias"))
ATTENTION = tuple(f"{layer}_{kind}" for layer in ("q", "k", "v", "out") for kind in ("weight", "bias"))


class Size(NamedTuple):
    """The defaults are SAM's at 1024 pixels."""

    dtype: torch.dtype
    batch: int
    max_offset: float
    tokens: int | None
    channels: int = 256
    height: int = 64
    width: int = 64

    @property
    def elements(self) -> int:
        """Of an image-sized tensor."""
        return self.batch * self.channels * self.height * self.width

    @property
    def facts(self) -> dict[str, object]:
        facts = {"T": self.tokens, "C": self.channels, "H": self.height, "W": self.width}
        return facts | {"max_offset": self.max_offset}

    @property
    def ends(self) -> list[int]:
        """The prompts that are compared with the truth: where an address overflows, it does so in the last."""
        return sorted({0, self.batch - 1})


def sizes(run: Run, max_offset: float, tokens: int | None) -> list[Size]:
    """The most telling first."""
    small = (16, 9, 8) if run.quick else ()
    return [Size(*pair, max_offset, tokens, *small) for pair in run.dtypes_and_batches(on_cpu=(1, 16))]


def make_inputs(size: Size, device: torch.device) -> Inputs:
    """All that the steps of one layer take, results of earlier steps included, so that each can be run alone.

    Images are channels-last. Weights are of a size that keeps the variance, offsets of about a pixel.
    """
    generator = torch.Generator(device).manual_seed(0)
    batch, channels, place = size.batch, size.channels, (size.height, size.width)
    inner, thin = min(INNER, channels), channels**-0.5

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, generator=generator)).to(size.dtype)

    inputs: Inputs = {
        "queries": normal(batch, size.tokens or 1, channels),  # their positional encoding added
        "features": normal(batch, *place, channels).permute(0, 3, 1, 2),  # x
        "projected": normal(batch, *place, channels).permute(0, 3, 1, 2),  # x*
        "offsets": normal(batch, 2, *place),
        "alpha": normal(batch, 2),  # the router's
        "key_pe": normal(1, *place, channels).permute(0, 3, 1, 2),
        "max_offset": size.max_offset,
        "projection_weight": normal(channels, channels, scale=thin),
        "projection_bias": normal(channels, scale=thin),
        "depthwise_weight": normal(channels, 1, 5, 5, scale=0.2),
        "depthwise_bias": normal(channels),
        "norm_weight": normal(channels),
        "norm_bias": normal(channels),
        "pointwise_weight": normal(2, channels, 1, 1, scale=thin),
        "pointwise_bias": normal(2, scale=thin),
        "out_weight": normal(channels, inner, scale=inner**-0.5),
        "out_bias": normal(channels, scale=thin),
    }
    for name in ("q", "k", "v"):
        inputs |= {f"{name}_weight": normal(inner, channels, scale=thin), f"{name}_bias": normal(inner, scale=thin)}
    return inputs


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same with every tensor changed."""
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def with_gradients(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """Fresh leaves of these names."""
    return inputs | {name: inputs[name].detach().requires_grad_() for name in names}
