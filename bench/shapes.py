"""Sizes that matter, and random inputs of those sizes: never zeros, whose offsets would all be integers."""

from typing import NamedTuple

import torch
from cases import Run
from torch import Tensor

HEADS = 8  # of SAM's decoder
INNER = 128  # channels of its attention to the image


class Size(NamedTuple):
    """The defaults are SAM's at 1024 pixels."""

    dtype: torch.dtype
    batch: int
    max_offset: float = 1.0
    tokens: int | None = None
    channels: int = 256
    height: int = 64
    width: int = 64

    @property
    def map_elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    @property
    def facts(self) -> dict[str, object]:
        facts = {"T": self.tokens, "C": self.channels, "H": self.height, "W": self.width}
        return facts | {"max_offset": self.max_offset}

    @property
    def ends(self) -> list[int]:
        """The prompts that are compared with the truth: where an address overflows, it is in the last."""
        return sorted({0, self.batch - 1})


def sizes(run: Run, max_offset: float = 1.0, tokens: int | None = None) -> list[Size]:
    """The most telling first."""
    small = {"channels": 16, "height": 9, "width": 8} if run.quick else {}
    return [Size(dtype, batch, max_offset, tokens, **small) for dtype, batch in run.dtypes_and_batches(1, 16)]


class SampleInputs(NamedTuple):
    """What `deformable_sample` takes."""

    features: Tensor  # (B, C, H, W), channels-last
    offsets: Tensor  # (B, 2, H, W)
    identity: Tensor  # (B, C, H, W), channels-last
    alpha: Tensor  # (B, 2)
    max_offset: float


class LayerInputs(NamedTuple):
    """All that the steps of one layer take, results of earlier steps included, so that each can be run alone."""

    queries: Tensor  # (B, T, C), their positional encoding added
    features: Tensor  # (B, C, H, W), channels-last: x
    alpha: Tensor  # (B, 2), the router's
    projected: Tensor  # (B, C, H, W), channels-last: x*
    offsets: Tensor  # (B, 2, H, W)
    key_pe: Tensor  # (1, C, H, W), channels-last
    max_offset: float
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
        return self[9:15]

    @property
    def attention(self) -> dict[str, Tensor]:
        return dict(zip(self._fields[15:], self[15:], strict=True))


PROJECTION = LayerInputs._fields[7:9]
HEAD = LayerInputs._fields[9:15]
BATCHED = ("queries", "features", "alpha", "projected", "offsets", "identity")

Inputs = SampleInputs | LayerInputs


def of_prompts(inputs: Inputs, prompts: list[int]) -> Inputs:
    return inputs._replace(**{name: getattr(inputs, name)[prompts] for name in BATCHED if name in inputs._fields})


def with_gradients(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """Fresh leaves of these names."""
    return inputs._replace(**{name: getattr(inputs, name).detach().requires_grad_() for name in names})


def in_float64(inputs: Inputs) -> Inputs:
    return type(inputs)(*[value.double() if isinstance(value, Tensor) else value for value in inputs])


def in_nchw(inputs: Inputs) -> Inputs:
    """Contiguous, as ``grid_sample`` prefers it."""
    return type(inputs)(*[value.contiguous() if isinstance(value, Tensor) else value for value in inputs])


class _Random:
    """Normal numbers, the same at each call."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=self.device, generator=self.generator)).to(self.size.dtype)

    def image(self, batch: int) -> Tensor:
        return self.normal(batch, self.size.height, self.size.width, self.size.channels).permute(0, 3, 1, 2)

    def offsets(self) -> Tensor:
        return self.normal(self.size.batch, 2, self.size.height, self.size.width)


def sample_inputs(size: Size, device: torch.device) -> SampleInputs:
    random, batch = _Random(size, device), size.batch
    images = random.image(batch), random.image(batch)
    return SampleInputs(images[0], random.offsets(), images[1], random.normal(batch, 2), size.max_offset)


def layer_inputs(size: Size, device: torch.device) -> LayerInputs:
    """Weights of a size that keeps the variance, offsets of about a pixel."""
    random, batch, channels = _Random(size, device), size.batch, size.channels
    inner, thin = min(INNER, channels), channels**-0.5
    return LayerInputs(
        random.normal(batch, size.tokens, channels),
        random.image(batch),
        random.normal(batch, 2),
        random.image(batch),
        random.offsets(),
        random.image(1),
        size.max_offset,
        random.normal(channels, channels, scale=thin),
        random.normal(channels, scale=thin),
        random.normal(channels, 1, 5, 5, scale=0.2),
        *[random.normal(channels) for _ in range(3)],
        random.normal(2, channels, 1, 1, scale=thin),
        random.normal(2, scale=thin),
        *[random.normal(*shape, scale=thin) for _ in range(3) for shape in ((inner, channels), (inner,))],
        random.normal(channels, inner, scale=inner**-0.5),
        random.normal(channels, scale=thin),
    )
