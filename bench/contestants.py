"""What is compared: this project's operations, what one writes in PyTorch in their place, and what others offer.

Each takes the inputs of `shapes` and gives its result.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from shapes import ATTENTION, HEAD, HEADS, Inputs
from torch import Tensor

import stable_sam_cuda
from stable_sam_cuda import backends

Step = Callable[[Inputs], Tensor]


def own_backends(device: torch.device) -> list[str]:
    """Those that sample on a device."""
    serving = ["cpu"] if device.type == "cpu" else ["cuda", "triton"]
    return [backend for backend in serving if backends.why_unavailable(backend) is None]


def fused_backend(device: torch.device) -> str:
    """That which has the offset head and the fused attention."""
    return "cpu" if device.type == "cpu" else "triton"


@cache
def compiled(step: Step) -> Step:
    return torch.compile(step, dynamic=False, fullgraph=True)


def sample(inputs: Inputs, backend: str) -> Tensor:
    """alpha_1 * projected[p + s tanh(raw)] + alpha_2 * features."""
    given = {"identity": inputs["features"], "alpha": inputs["alpha"], "max_offset": inputs["max_offset"]}
    return stable_sam_cuda.deformable_sample(inputs["projected"], inputs["offsets"], **given, backend=backend)


def locations(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clamped x and y, each (B, H, W), and how far they are from each pixel; in pixels, in float32."""
    height, width = inputs["offsets"].shape[2:]
    dx, dy = (inputs["max_offset"] * torch.tanh(inputs["offsets"].float())).unbind(1)
    columns = torch.arange(width, device=dx.device, dtype=dx.dtype)
    rows = torch.arange(height, device=dx.device, dtype=dx.dtype)[:, None]
    x, y = (columns + dx).clamp(0, width - 1), (rows + dy).clamp(0, height - 1)
    return x, y, x - columns, y - rows


def sample_eagerly(inputs: Inputs) -> Tensor:
    """What one writes in PyTorch: grid_sample, which wants its grid in the features' dtype, and two blends."""
    features, (x, y, _, _) = inputs["projected"], locations(inputs)
    height, width = features.shape[2:]
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1).to(features.dtype)
    sampled = F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=True)
    shares = inputs["alpha"][:, :, None, None, None].unbind(1)
    return shares[0] * sampled + shares[1] * inputs["features"]


def sample_by_torchvision(inputs: Inputs) -> Tensor:
    """``deform_conv2d`` as a modulated 1 x 1 sampler, alpha_1 its mask.

    Its weight is the identity over all channels, one matrix product; with a group a channel it would launch C of them.
    """
    from torchvision.ops import deform_conv2d

    features, (_, _, dx, dy) = inputs["projected"], locations(inputs)
    weight = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)[:, :, None, None]
    shares = inputs["alpha"][:, :, None, None, None].unbind(1)
    mask = shares[0].expand_as(dx[:, None])
    sampled = deform_conv2d(features, torch.stack((dy, dx), dim=1).to(features.dtype), weight, mask=mask)
    return sampled + shares[1] * inputs["features"]


def sample_by_deformops(inputs: Inputs) -> Tensor:
    """deformops 3's single-scale sampler with one point a pixel: channels-last, (dx, dy, weight) in pixels."""
    from deformops.registry import attn

    features, (_, _, dx, dy) = inputs["projected"], locations(inputs)
    shares = inputs["alpha"][:, :, None, None].unbind(1)
    points = torch.stack([part.to(features.dtype) for part in (dx, dy, shares[0].expand_as(dx))], dim=-1)
    geometry = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    sampled = attn(features.permute(0, 2, 3, 1), points, **geometry, group_dims=features.shape[1])
    return sampled.permute(0, 3, 1, 2) + shares[1][..., None] * inputs["features"]


def head(inputs: Inputs, backend: str) -> Tensor:
    return stable_sam_cuda.offset_head(inputs["projected"], *[inputs[name] for name in HEAD], backend=backend)


def head_eagerly(inputs: Inputs) -> Tensor:
    depthwise, bias, norm_weight, norm_bias, pointwise, pointwise_bias = (inputs[name] for name in HEAD)
    channels, padding = len(depthwise), depthwise.shape[-1] // 2
    hidden = F.conv2d(inputs["projected"], depthwise, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    hidden = F.gelu(F.layer_norm(hidden, (channels,), norm_weight, norm_bias, 1e-6))
    return F.linear(hidden, pointwise.flatten(1), pointwise_bias).permute(0, 3, 1, 2)


def attend(inputs: Inputs, backend: str) -> Tensor:
    maps = [inputs[name] for name in ("queries", "projected", "features", "offsets", "alpha", "key_pe")]
    weights = {name: inputs[name] for name in ATTENTION}
    options = {"num_heads": HEADS, "max_offset": inputs["max_offset"], "backend": backend}
    return stable_sam_cuda.deformable_attention(*maps, **weights, **options)


def attend_eagerly(inputs: Inputs) -> Tensor:
    """Sampled by grid_sample, blended, attended to."""
    return attend_plainly(inputs | {"features": sample_eagerly(inputs)})


def attend_plainly(inputs: Inputs, *, fused_softmax: bool = False) -> Tensor:
    """SAM's attention of tokens to pixels without any plugin, with its two projections of each pixel."""
    values = inputs["features"].flatten(2).transpose(1, 2)
    keys = values + inputs["key_pe"].flatten(2).transpose(1, 2)

    def by_head(tensor: Tensor, name: str) -> Tensor:
        projected = F.linear(tensor, inputs[f"{name}_weight"], inputs[f"{name}_bias"])
        return projected.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q, k, v = by_head(inputs["queries"], "q"), by_head(keys, "k"), by_head(values, "v")
    if fused_softmax:
        heads = F.scaled_dot_product_attention(q, k, v)
    else:
        heads = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v
    return F.linear(heads.transpose(1, 2).flatten(2), inputs["out_weight"], inputs["out_bias"])


attend_by_sdpa = partial(attend_plainly, fused_softmax=True)


def layer(inputs: Inputs, backend: str) -> Tensor:
    """The projection, a matrix product over channels-last pixels; the offset head; sampling and attention in one."""
    pixels = inputs["features"].permute(0, 2, 3, 1)
    projected = F.linear(pixels, inputs["projection_weight"], inputs["projection_bias"]).permute(0, 3, 1, 2)
    inputs = inputs | {"projected": projected}
    return attend(inputs | {"offsets": head(inputs, backend)}, backend)


def layer_eagerly(inputs: Inputs) -> Tensor:
    """The projection as the 1 x 1 convolution that it is in the plugin."""
    weight = inputs["projection_weight"][:, :, None, None]
    inputs = inputs | {"projected": F.conv2d(inputs["features"], weight, inputs["projection_bias"])}
    return attend_eagerly(inputs | {"offsets": head_eagerly(inputs)})
