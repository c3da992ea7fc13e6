"""Sizes that matter, and random inputs of those sizes: never zeros, whose offsets would all be integers."""

from typing import Any, NamedTuple

import torch
from cases import Run
from torch import Tensor

HEADS = 8  # of SAM's decoder
INNER = 128  # channels of its attention to the image

Inputs = dict[str, Any]  # tensors, and max_offset
BATCHED = ("queries", "features", "projected", "offsets", "identity", "alpha")
PROJECTION = ("projection_weight", "projection_bias")
HEAD = tuple(f"{layer}_{kind}" for layer in ("depthwise", "norm", "pointwise") for kind in ("weight", "bias"))
ATTENTION = tuple(f"{layer}_{kind}" for layer in ("q", "k", "v", "out") for kind in ("weight", "bias"))


class Size(NamedTuple):
    """The defaults are SAM's at 1024 pixels."""

    dtype: torch.dtype
    batch: int
    max_offset: float
    tokens: int | None = None
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


def sizes(run: Run, max_offset: float, tokens: int | None = None) -> list[Size]:
    """The most telling first."""
    small = {"channels": 16, "height": 9, "width": 8} if run.quick else {}
    return [Size(dtype, batch, max_offset, tokens, **small) for dtype, batch in run.dtypes_and_batches(on_cpu=(1, 16))]


class Random:
    """Normal numbers, the same for every call of the program."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self._size, self._device, self._generator = size, device, torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=self._device, generator=self._generator)).to(self._size.dtype)

    def image(self, batch: int, channels: int) -> Tensor:
        """(B, C, H, W), channels-last."""
        return self.normal(batch, self._size.height, self._size.width, channels).permute(0, 3, 1, 2)


def sample_inputs(size: Size, device: torch.device) -> Inputs:
    """The arguments of `deformable_sample`."""
    random, batch, channels = Random(size, device), size.batch, size.channels
    images = {"features": random.image(batch, channels), "identity": random.image(batch, channels)}
    offsets = random.image(batch, 2).contiguous()
    return images | {"offsets": offsets, "alpha": random.normal(batch, 2), "max_offset": size.max_offset}


def layer_inputs(size: Size, device: torch.device) -> Inputs:
    """All that the steps of one layer take, results of earlier steps included, so that each can be run alone.

    Weights are of a size that keeps the variance, offsets of about a pixel.
    """
    random, batch, channels = Random(size, device), size.batch, size.channels
    inner, thin = min(INNER, channels), channels**-0.5
    inputs: Inputs = {
        "queries": random.normal(batch, size.tokens, channels),  # their positional encoding added
        "features": random.image(batch, channels),  # x
        "projected": random.image(batch, channels),  # x*
        "offsets": random.image(batch, 2).contiguous(),
        "alpha": random.normal(batch, 2),  # the router's
        "key_pe": random.image(1, channels),
        "max_offset": size.max_offset,
        "projection_weight": random.normal(channels, channels, scale=thin),
        "projection_bias": random.normal(channels, scale=thin),
        "depthwise_weight": random.normal(channels, 1, 5, 5, scale=0.2),
        "depthwise_bias": random.normal(channels),
        "norm_weight": random.normal(channels),
        "norm_bias": random.normal(channels),
        "pointwise_weight": random.normal(2, channels, 1, 1, scale=thin),
        "pointwise_bias": random.normal(2, scale=thin),
    }
    for name in ATTENTION:
        into, out_of = (inner, channels) if name[:3] != "out" else (channels, inner)
        shape = (into, out_of) if name.endswith("weight") else (into,)
        inputs[name] = random.normal(*shape, scale=out_of**-0.5)
    return inputs


def mapped(inputs: Inputs, change: Any) -> Inputs:
    """The same with every tensor changed."""
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def of_prompts(inputs: Inputs, prompts: list[int]) -> Inputs:
    return {name: value[prompts] if name in BATCHED else value for name, value in inputs.items()}


def with_gradients(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """Fresh leaves of these names."""
    return inputs | {name: inputs[name].detach().requires_grad_() for name in names}
