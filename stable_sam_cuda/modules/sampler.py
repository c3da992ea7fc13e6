"""Stable-SAM's plugin: deformable sampling weighed by dynamic routing (DSP and DRP)."""

import math

import torch
from torch import Tensor, nn

from stable_sam_cuda.modules.offset_network import OffsetNetwork
from stable_sam_cuda.modules.router import DynamicRouter
from stable_sam_cuda.modules.validation import require_integer
from stable_sam_cuda.ops.deformable_sample import deformable_sample

AMPLITUDES = ("conv", "location", "channel")
DEFAULT_MAX_OFFSET = 4.0


class DeformableSampler(nn.Module):
    """Calibrated image features ``u = alpha_1 * sample(x*, p + s_p * tanh(raw)) + alpha_2 * x``.

    ``x*`` and ``raw`` come from an `OffsetNetwork`, ``alpha`` from a `DynamicRouter` that reads the output token.
    An untrained sampler is the identity: ``u = x`` up to rounding.

    Args:
        channels: channels C of the image features.
        token_channels: channels of the output token.
        router_hidden: hidden width of the router; 0 leaves it out (the DRP-off ablation: ``alpha = (1, 0)``).
        max_offset: s_p, the largest displacement in pixels of the feature map; 0 displaces nothing (the DSP-off
            ablation). The paper gives neither its value nor its unit; 4 pixels of SAM's 64 x 64 map are 64 pixels
            of its 1024-pixel input.
        amplitude: how the features' amplitude is modulated, of which the paper allows three readings:
            ``"conv"`` (figure 3b, the default): the offset network's first convolution carries it, ``x*`` is
            sampled;
            ``"location"``: x itself is sampled, times one predicted factor a location;
            ``"channel"``: x itself is sampled, times one predicted factor a channel and location.
            Predicted factors are ``2 * sigmoid(Conv1x1(x*))`` with a zero convolution, so they start at 1.
        kernel_size: side of the offset network's depthwise kernel, odd.
        blocks: how many of the mask decoder's last two-way blocks share this sampler, where `stabilize` installs it:
            1, as in the paper, or 2, all that SAM has. It is kept here because trained weights belong to it.
        backend: backend of `deformable_sample`.
    """

    def __init__(
        self,
        channels: int = 256,
        *,
        token_channels: int = 256,
        router_hidden: int = 32,
        max_offset: float = DEFAULT_MAX_OFFSET,
        amplitude: str = "conv",
        kernel_size: int = 5,
        blocks: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        require_integer("token_channels", token_channels, 1)
        require_integer("router_hidden", router_hidden, 0)
        require_integer("blocks", blocks, 1)
        if amplitude not in AMPLITUDES:
            raise ValueError(f"amplitude: expected one of {', '.join(AMPLITUDES)}, got {amplitude!r}")
        if isinstance(max_offset, bool) or not isinstance(max_offset, (int, float)):
            raise TypeError(f"max_offset: expected a number, got {max_offset!r}")
        if not (math.isfinite(max_offset) and max_offset >= 0):
            raise ValueError(f"max_offset: expected a finite number of at least 0, got {max_offset}")

        self.channels = channels
        self.token_channels = token_channels
        self.router_hidden = router_hidden
        self.max_offset = float(max_offset)
        self.amplitude = amplitude
        self.kernel_size = kernel_size
        self.blocks = blocks
        self.backend = backend

        self.offset_network = OffsetNetwork(channels, kernel_size)
        self.router = DynamicRouter(token_channels, router_hidden) if router_hidden > 0 else None
        self.amplitude_head = self._new_amplitude_head()

    def _new_amplitude_head(self) -> nn.Conv2d | None:
        if self.amplitude == "conv":
            return None
        head = nn.Conv2d(self.channels, 1 if self.amplitude == "location" else self.channels, 1)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return head

    def config(self) -> dict[str, int | float | str]:
        """The constructor's arguments that determine parameters and result (all but the backend)."""
        names = ("channels", "token_channels", "router_hidden", "max_offset", "amplitude", "kernel_size", "blocks")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {**self.config(), "backend": self.backend}.items())

    def forward(self, image_features: Tensor, output_token: Tensor) -> Tensor:
        """Calibrate the features from which an attention takes its keys and values.

        Args:
            image_features: x, (B, C, H, W); channels-last memory is the native layout. A batch of 1 serves all tokens.
            output_token: t_o, the token of the output mask, (B, token_channels).

        Returns:
            u, (B, C, H, W), in channels-last memory.
        """
        self._check(image_features, output_token)
        features = image_features.contiguous(memory_format=torch.channels_last)
        alpha = None if self.router is None else self.router(output_token)
        return self._sample(features, identity=None if alpha is None else features, alpha=alpha)

    def alpha(self, output_token: Tensor) -> Tensor:
        """The shares of deformed features and of x for output tokens (B, token_channels): (B, 2), or (1, 2) for all.

        Without a router they are 1 and 0.
        """
        if self.router is None:
            return torch.eye(1, 2, dtype=output_token.dtype, device=output_token.device)
        return self.router(output_token)

    def deformed(self, image_features: Tensor) -> Tensor:
        """What `forward` blends with x by alpha: x* at the displaced locations, amplitude included. It knows no prompt.

        image_features: x, (B, C, H, W). Returns (B, C, H, W), in channels-last memory.
        """
        return self._sample(image_features.contiguous(memory_format=torch.channels_last))

    def _sample(self, features: Tensor, identity: Tensor | None = None, alpha: Tensor | None = None) -> Tensor:
        projected, offsets = self.offset_network(features, self.backend)
        head = self.amplitude_head
        return deformable_sample(
            projected if head is None else features,
            offsets,
            identity=identity,
            alpha=alpha,
            amplitude=None if head is None else 2 * torch.sigmoid(head(projected)),
            max_offset=self.max_offset,
            backend=self.backend,
        )

    def _check(self, image_features: Tensor, output_token: Tensor) -> None:
        if image_features.dim() != 4 or image_features.shape[1] != self.channels:
            raise ValueError(
                f"image_features: expected shape (B, {self.channels}, H, W), got {tuple(image_features.shape)}"
            )
        if output_token.dim() != 2 or output_token.shape[1] != self.token_channels:
            raise ValueError(
                f"output_token: expected shape (B, {self.token_channels}), got {tuple(output_token.shape)}"
            )
        batches = image_features.shape[0], output_token.shape[0]
        if batches[0] != batches[1] and 1 not in batches:
            raise ValueError(
                f"output_token: expected a batch of {batches[0]} or 1, that of image_features, got {batches[1]}"
            )
