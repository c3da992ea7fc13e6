"""Sizes and random tensors of the attention benchmark: SAM's second decoder layer with Stable-SAM's plugin."""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_OFFSET = 1.0
HEADS = 8  # of SAM's decoder
INNER = 128  # channels of its attention to the image


class Size(NamedTuple):
    """The defaults are SAM's at 1024 pixels, with one box for a prompt."""

    dtype: torch.dtype
    batch: int
    tokens: int = 7
    channels: int = 256
    height: int = 64
    width: int = 64

    @property
    def map_elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    @property
    def map_bytes(self) -> int:
        return self.map_elements * self.dtype.itemsize

    @property
    def facts(self) -> dict[str, object]:
        facts = {"dtype": str(self.dtype).removeprefix("torch."), "B": self.batch, "T": self.tokens}
        return facts | {"C": self.channels, "H": self.height, "W": self.width, "max_offset": MAX_OFFSET}


SIZES = [  # the most telling first
    *(Size(torch.bfloat16, batch) for batch in (64, 16, 1, 256)),
    *(Size(torch.float32, batch) for batch in (64, 1, 16, 256)),
    *(Size(torch.float16, batch) for batch in (64, 1, 16, 256)),
]
TINY = [Size(torch.float32, 2, 3, 16, 5, 6), Size(torch.bfloat16, 2, 3, 16, 5, 6)]


class LayerTensors(NamedTuple):
    """All that the steps of one layer take, results of earlier steps included, so that each can be run alone."""

    queries: Tensor  # (B, T, C), their positional encoding added
    features: Tensor  # (B, C, H, W), channels-last: x
    alpha: Tensor  # (B, 2), the router's
    key_pe: Tensor  # (1, C, H, W)
    projected: Tensor  # (B, C, H, W), channels-last: x*
    offsets: Tensor  # (B, 2, H, W)
    projection_weight: Tensor  # (C, C)
    projection_bias: Tensor
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    pointwise_weight: Tensor
    pointwise_bias: Tensor
    q_weight: Tensor  # (INNER, C)
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    out_weight: Tensor  # (C, INNER)
    out_bias: Tensor

    @property
    def head(self) -> tuple[Tensor, ...]:
        """Parameters of the offset head."""
        return self[8:14]

    @property
    def attention(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._fields[14:]}

    def first_prompts(self, count: int) -> "LayerTensors":
        batched = ("queries", "features", "alpha", "projected", "offsets")
        return self._replace(**{name: getattr(self, name)[:count] for name in batched})

    def double(self) -> "LayerTensors":
        return LayerTensors(*[tensor.double() for tensor in self])


PROJECTION = LayerTensors._fields[6:8]
HEAD = LayerTensors._fields[8:14]


def make_tensors(size: Size, device: torch.device) -> LayerTensors:
    """Random and never zero; weights of a size that keeps the variance, offsets of about a pixel."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, generator=generator)).to(size.dtype)

    def image(batch: int) -> Tensor:
        return normal(batch, size.height, size.width, channels).permute(0, 3, 1, 2)

    batch, channels = size.batch, size.channels
    inner, thin = min(INNER, channels), channels**-0.5
    into = [normal(*shape, scale=thin) for _ in range(3) for shape in ((inner, channels), (inner,))]
    return LayerTensors(
        normal(batch, size.tokens, channels),
        image(batch),
        normal(batch, 2),
        image(1),
        image(batch),
        normal(batch, 2, size.height, size.width),
        normal(channels, channels, scale=thin),
        normal(channels, scale=thin),
        normal(channels, 1, 5, 5, scale=0.2),
        *[normal(channels) for _ in range(3)],
        normal(2, channels, 1, 1, scale=thin),
        normal(2, scale=thin),
        *into,
        normal(channels, inner, scale=inner**-0.5),
        normal(channels, scale=thin),
    )
