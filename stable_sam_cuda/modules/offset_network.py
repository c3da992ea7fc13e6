"""The offset network of deformable sampling (Stable-SAM, figure 3b)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_sam_cuda.modules.plain_module import is_plain
from stable_sam_cuda.modules.validation import require_integer
from stable_sam_cuda.ops import backends, offset_head
from stable_sam_cuda.ops.autocast import autocast_dtype
from stable_sam_cuda.ops.backends import Backend

NORM_EPSILON = 1e-6


class OffsetNetwork(nn.Module):
    """Predicts where every location of the image features is sampled.

    ``x* = Conv1x1(x)``; ``raw = Conv1x1(GELU(LayerNorm(DWConv(x*))))`` with the norm over the channels of each
    location (figure 3b of the paper). At initialisation ``x* = x`` and the raw offsets are zero.

    Args:
        channels: channels C of the image features.
        kernel_size: side of the depthwise convolution's kernel, odd.
    """

    def __init__(self, channels: int, kernel_size: int = 5) -> None:
        super().__init__()
        require_integer("channels", channels, 1)
        if require_integer("kernel_size", kernel_size, 1) % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, so that the map keeps its size, got {kernel_size}")
        self.projection = nn.Conv2d(channels, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPSILON)
        self.pointwise = nn.Conv2d(channels, 2, 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity projection and zero offsets; the depthwise convolution keeps PyTorch's default."""
        weight, bias = self.projection.parameters()
        weight.copy_(torch.eye(len(weight), device=weight.device)[:, :, None, None])
        for parameter in (bias, *self.pointwise.parameters()):
            parameter.zero_()

    def forward(self, features: Tensor, backend: Backend | str = Backend.AUTO) -> tuple[Tensor, Tensor]:
        """Features (B, C, H, W) -> projected features x* (B, C, H, W) and raw offsets (B, 2, H, W).

        Offsets are before tanh; channel 0 is x, channel 1 is y. By `offset_head` where the backend has kernels for it.
        """
        projected = self.projection(features)
        kernels = backends.choose("offset_head", backend, projected.device, autocast_dtype(projected)).kernels
        if kernels is not None and self._head_is_plain():
            parameters = cast("list[Any]", [p for layer in self._head() for p in (layer.weight, layer.bias)])
            inputs = offset_head.HeadInputs(*[projected, *parameters, self.norm.eps])
            offset_head.check(inputs)
            return projected, offset_head.run(kernels, inputs)
        hidden = F.gelu(self.norm(self.depthwise(projected).permute(0, 2, 3, 1)))
        # As a matrix product the two-channel convolution is several times faster on a CPU.
        offsets = F.linear(hidden, self.pointwise.weight.flatten(1), self.pointwise.bias)
        return projected, offsets.permute(0, 3, 1, 2)

    def _head(self) -> tuple[nn.Module, ...]:
        return self.depthwise, self.norm, self.pointwise

    def _head_is_plain(self) -> bool:
        """Whether the layers' parameters say what they compute: no hooks, no layers of another class in their place."""
        return all(map(is_plain, self._head(), (nn.Conv2d, nn.LayerNorm, nn.Conv2d)))
