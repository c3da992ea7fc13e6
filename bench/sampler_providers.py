"""Contestants of the sampler benchmark: all compute alpha_1 * features[p + s tanh(raw)] + alpha_2 * identity."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_sam_cuda import Backend, backends

Sampler = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def displaced(offsets: Tensor, max_offset: float) -> tuple[Tensor, Tensor]:
    """Clamped sampling locations (x, y), each (B, H, W), in pixels and in float32 whatever the dtype."""
    height, width = offsets.shape[2:]
    offsets = offsets.float()
    columns = torch.arange(width, device=offsets.device, dtype=offsets.dtype)
    rows = torch.arange(height, device=offsets.device, dtype=offsets.dtype)[:, None]
    x = (columns + max_offset * torch.tanh(offsets[:, 0])).clamp(0, width - 1)
    y = (rows + max_offset * torch.tanh(offsets[:, 1])).clamp(0, height - 1)
    return x, y


def eager(features: Tensor, offsets: Tensor, identity: Tensor, alpha: Tensor, max_offset: float) -> Tensor:
    """What one writes in PyTorch: grid_sample, which wants its grid in the features' dtype, and two blends."""
    height, width = features.shape[2:]
    x, y = displaced(offsets, max_offset)
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1).to(features.dtype)
    sampled = F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return alpha[:, :1, None, None] * sampled + alpha[:, 1:, None, None] * identity


def deform_conv(features: Tensor, offsets: Tensor, identity: Tensor, alpha: Tensor, max_offset: float) -> Tensor:
    """torchvision's deform_conv2d as a modulated 1x1 sampler, alpha_1 its mask."""
    from torchvision.ops import deform_conv2d

    batch, channels, height, width = features.shape
    x, y = displaced(offsets, max_offset)
    columns = torch.arange(width, device=offsets.device, dtype=x.dtype)
    rows = torch.arange(height, device=offsets.device, dtype=x.dtype)[:, None]
    displacement = torch.stack((y - rows, x - columns), dim=1).to(features.dtype)
    mask = alpha[:, :1, None, None].expand(batch, 1, height, width)
    ones = torch.ones((channels, 1, 1, 1), dtype=features.dtype, device=features.device)
    sampled = deform_conv2d(features, displacement, ones, mask=mask)
    return sampled + alpha[:, 1:, None, None] * identity


def compiled_eager() -> Sampler:
    torch._dynamo.reset()
    return torch.compile(eager, dynamic=False, fullgraph=True)


def operation(name: str) -> Sampler:
    sample = getattr(torch.ops.stable_sam_cuda, name)
    return lambda features, offsets, identity, alpha, s: sample(features, offsets, identity, alpha, None, s)


def own(device: torch.device) -> dict[str, Sampler]:
    """This project's kernels that serve a device."""
    names = {Backend.CUDA: "deformable_sample", Backend.TRITON: "deformable_sample_triton"}
    if device.type == "cpu":
        names = {Backend.CPU: "deformable_sample"}
    there = [backend for backend in names if backends.why_unavailable(backend) is None]
    return {backend.value: operation(names[backend]) for backend in there}


def peers(with_compile: bool) -> dict[str, Callable[[], Sampler]]:
    """What others offer; called to be made, because compiling takes long and may fail."""
    made: dict[str, Callable[[], Sampler]] = {"eager": lambda: eager, "deform_conv2d": lambda: deform_conv}
    if with_compile:
        made["torch.compile"] = compiled_eager
    return made
