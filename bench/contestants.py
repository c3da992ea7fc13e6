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
    """This project's kernels that serve a device."""
    serving = ["cpu"] if device.type == "cpu" else ["cuda", "triton"]
    return [backend for backend in serving if backends.why_unavailable(backend) is None]


def fused_backend(device: torch.device) -> str:
    """That which has the offset head and the fused attention."""
    return {"cpu": "cpu", "cuda": "triton"}[device.type]


@cache
def compiled(step: Step) -> Step:
    return torch.compile(step, dynamic=False, fullgraph=True)


def sample(inputs: Inputs, backend: str) -> Tensor:
    return stable_sam_cuda.deformable_sample(**inputs, backend=backend)


def displaced(offsets: Tensor, max_offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clamped locations x and y, each (B, H, W), and how far they are from each pixel; in pixels, in float32."""
    height, width = offsets.shape[2:]
    columns = torch.arange(width, device=offsets.device, dtype=torch.float32)
    rows = torch.arange(height, device=offsets.device, dtype=torch.float32)[:, None]
    x = (columns + max_offset * torch.tanh(offsets[:, 0].float())).clamp(0, width - 1)
    y = (rows + max_offset * torch.tanh(offsets[:, 1].float())).clamp(0, height - 1)
    return x, y, x - columns, y - rows


def blend(sampled: Tensor, alpha: Tensor, identity: Tensor) -> Tensor:
    return sampled + alpha[:, 1:, None, None] * identity


def sample_eagerly(inputs: Inputs) -> Tensor:
    """What one writes in PyTorch: grid_sample, which wants its grid in the features' dtype, and two blends."""
    features, alpha = inputs["features"], inputs["alpha"]
    x, y, _, _ = displaced(inputs["offsets"], inputs["max_offset"])
    height, width = features.shape[2:]
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1).to(features.dtype)
    sampled = F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return blend(alpha[:, :1, None, None] * sampled, alpha, inputs["identity"])


def sample_by_torchvision(inputs: Inputs) -> Tensor:
    """``deform_conv2d`` as a modulated 1 x 1 sampler, alpha_1 its mask.

    Its weight is the identity over all channels, one matrix product; with a group a channel it would launch C of them.
    """
    from torchvision.ops import deform_conv2d

    features, alpha = inputs["features"], inputs["alpha"]
    batch, channels, height, width = features.shape
    _, _, dx, dy = displaced(inputs["offsets"], inputs["max_offset"])
    weight = torch.eye(channels, dtype=features.dtype, device=features.device)[:, :, None, None]
    mask = alpha[:, :1, None, None].expand(batch, 1, height, width)
    sampled = deform_conv2d(features, torch.stack((dy, dx), dim=1).to(features.dtype), weight, mask=mask)
    return blend(sampled, alpha, inputs["identity"])


def sample_by_deformops(inputs: Inputs) -> Tensor:
    """deformops 3's single-scale sampler with one point a pixel: channels-last, (dx, dy, weight) in pixels."""
    from deformops.registry import attn

    features, alpha = inputs["features"], inputs["alpha"]
    _, _, dx, dy = displaced(inputs["offsets"], inputs["max_offset"])
    points = torch.stack([part.to(features.dtype) for part in (dx, dy, alpha[:, :1, None].expand_as(dx))], dim=-1)
    geometry = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    sampled = attn(features.permute(0, 2, 3, 1), points, **geometry, group_dims=features.shape[1])
    return blend(sampled.permute(0, 3, 1, 2), alpha, inputs["identity"])


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
    calibrated = sample_eagerly(inputs | {"features": inputs["projected"], "identity": inputs["features"]})
    return attend_plainly(inputs | {"features": calibrated})


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
