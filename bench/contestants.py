"""What is compared: this project's operations, what one writes in PyTorch in their place, and what others offer.

Each is a step, from the inputs of one size to its result.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from shapes import HEADS, LayerInputs, SampleInputs
from torch import Tensor

import stable_sam_cuda
from stable_sam_cuda import Backend, backends

Step = Callable[..., Tensor]


def own_backends(device: torch.device) -> list[str]:
    """This project's kernels that serve a device."""
    serving = [Backend.CPU] if device.type == "cpu" else [Backend.CUDA, Backend.TRITON]
    return [backend.value for backend in serving if backends.why_unavailable(backend) is None]


@cache
def compiled(step: Step) -> Step:
    return torch.compile(step, dynamic=False, fullgraph=True)


# The sampler: alpha_1 * features[p + s tanh(raw)] + alpha_2 * identity.


def sample(inputs: SampleInputs, backend: str) -> Tensor:
    features, offsets, identity, alpha, s = inputs
    return stable_sam_cuda.deformable_sample(
        features, offsets, identity=identity, alpha=alpha, max_offset=s, backend=backend
    )


def _pixels(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns (W) and rows (H, 1)."""
    return torch.arange(width, device=device).float(), torch.arange(height, device=device).float()[:, None]


def _locations(offsets: Tensor, max_offset: float) -> tuple[Tensor, Tensor]:
    """Clamped sampling locations x and y, each (B, H, W), in pixels and in float32 whatever the dtype."""
    height, width = offsets.shape[2:]
    columns, rows = _pixels(height, width, offsets.device)
    offsets = offsets.float()
    x = (columns + max_offset * torch.tanh(offsets[:, 0])).clamp(0, width - 1)
    y = (rows + max_offset * torch.tanh(offsets[:, 1])).clamp(0, height - 1)
    return x, y


def _displacements(offsets: Tensor, max_offset: float) -> tuple[Tensor, Tensor]:
    """The same from each pixel's own place: dx and dy."""
    columns, rows = _pixels(*offsets.shape[2:], offsets.device)
    x, y = _locations(offsets, max_offset)
    return x - columns, y - rows


def sample_eagerly(inputs: SampleInputs) -> Tensor:
    """What one writes in PyTorch: grid_sample, which wants its grid in the features' dtype, and two blends."""
    features, offsets, identity, alpha, max_offset = inputs
    height, width = features.shape[2:]
    x, y = _locations(offsets, max_offset)
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1).to(features.dtype)
    sampled = F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return alpha[:, :1, None, None] * sampled + alpha[:, 1:, None, None] * identity


def sample_by_torchvision(inputs: SampleInputs) -> Tensor:
    """``deform_conv2d`` as a modulated 1 x 1 sampler, alpha_1 its mask.

    Its weight is the identity over all channels, one matrix product; with a group a channel it launches one each.
    """
    from torchvision.ops import deform_conv2d

    features, offsets, identity, alpha, max_offset = inputs
    batch, channels, height, width = features.shape
    dx, dy = _displacements(offsets, max_offset)
    weight = torch.eye(channels, dtype=features.dtype, device=features.device)[:, :, None, None]
    mask = alpha[:, :1, None, None].expand(batch, 1, height, width)
    sampled = deform_conv2d(features, torch.stack((dy, dx), dim=1).to(features.dtype), weight, mask=mask)
    return sampled + alpha[:, 1:, None, None] * identity


def sample_by_deformops(inputs: SampleInputs) -> Tensor:
    """deformops 3's single-scale sampler with one point a pixel; channels-last, (dx, dy, weight) in pixels."""
    from deformops.registry import attn

    features, offsets, identity, alpha, max_offset = inputs
    batch, channels, height, width = features.shape
    dx, dy = _displacements(offsets, max_offset)
    weight = alpha[:, :1, None].expand(batch, height, width)
    points = torch.stack((dx.to(features.dtype), dy.to(features.dtype), weight), dim=-1)
    geometry = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "group_dims": channels}
    sampled = attn(features.permute(0, 2, 3, 1), points, **geometry).permute(0, 3, 1, 2)
    return sampled + alpha[:, 1:, None, None] * identity


# The layer: projection, offset head, and the attention over what is sampled.


def project(inputs: LayerInputs) -> LayerInputs:
    """With x*, a matrix product over channels-last pixels."""
    pixels = inputs.features.permute(0, 2, 3, 1)
    projected = F.linear(pixels, inputs.projection_weight, inputs.projection_bias)
    return inputs._replace(projected=projected.permute(0, 3, 1, 2))


def head(inputs: LayerInputs, backend: str) -> Tensor:
    return stable_sam_cuda.offset_head(inputs.projected, *inputs.head, backend=backend)


def head_eagerly(inputs: LayerInputs) -> Tensor:
    depthwise, bias, norm_weight, norm_bias, pointwise, pointwise_bias = inputs.head
    channels, padding = inputs.projected.shape[1], depthwise.shape[-1] // 2
    hidden = F.conv2d(inputs.projected, depthwise, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    hidden = F.gelu(F.layer_norm(hidden, (channels,), norm_weight, norm_bias, 1e-6))
    return F.linear(hidden, pointwise.flatten(1), pointwise_bias).permute(0, 3, 1, 2)


def attend(inputs: LayerInputs, backend: str) -> Tensor:
    maps = (inputs.projected, inputs.features, inputs.offsets, inputs.alpha, inputs.key_pe)
    options = {"num_heads": HEADS, "max_offset": inputs.max_offset, "backend": backend}
    return stable_sam_cuda.deformable_attention(inputs.queries, *maps, **inputs.attention, **options)


def attend_eagerly(inputs: LayerInputs) -> Tensor:
    """Sampled by grid_sample, blended, attended to."""
    sampled = SampleInputs(inputs.projected, inputs.offsets, inputs.features, inputs.alpha, inputs.max_offset)
    return attend_plainly(inputs._replace(features=sample_eagerly(sampled)))


def attend_plainly(inputs: LayerInputs, *, fused_softmax: bool = False) -> Tensor:
    """SAM's attention of tokens to pixels without any plugin, with its two projections of each pixel."""
    values = inputs.features.flatten(2).transpose(1, 2)
    keys = values + inputs.key_pe.flatten(2).transpose(1, 2)

    def by_head(tensor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(tensor, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q = by_head(inputs.queries, inputs.q_weight, inputs.q_bias)
    k = by_head(keys, inputs.k_weight, inputs.k_bias)
    v = by_head(values, inputs.v_weight, inputs.v_bias)
    if fused_softmax:
        heads = F.scaled_dot_product_attention(q, k, v)
    else:
        heads = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v
    return F.linear(heads.transpose(1, 2).flatten(2), inputs.out_weight, inputs.out_bias)


attend_by_sdpa = partial(attend_plainly, fused_softmax=True)


def layer(inputs: LayerInputs, backend: str) -> Tensor:
    """One matrix product, the offset head, sampling and attention in one."""
    inputs = project(inputs)
    return attend(inputs._replace(offsets=head(inputs, backend)), backend)


def layer_eagerly(inputs: LayerInputs) -> Tensor:
    """The projection as the 1 x 1 convolution that it is in the plugin."""
    weight = inputs.projection_weight[:, :, None, None]
    inputs = inputs._replace(projected=F.conv2d(inputs.features, weight, inputs.projection_bias))
    return attend_eagerly(inputs._replace(offsets=head_eagerly(inputs)))
