"""The dynamic routing plugin (Stable-SAM, figure 3c)."""

import torch
from torch import Tensor, nn

from stable_sam_cuda.modules.validation import require_integer


class DynamicRouter(nn.Module):
    """Weighs deformed against original features by the prompt: ``alpha = softmax(MLP(t_o)) * s``.

    The MLP is Linear, LayerNorm, GELU, Linear to 2 (figure 3c of the paper); ``s`` is a learnable scalar that
    starts at 1, so ``alpha_1 + alpha_2 = 1`` at initialisation.

    Args:
        token_channels: channels of the output token.
        hidden: width of the hidden layer. The paper leaves it open; 32 gives its plugin size of 0.08 M.
    """

    def __init__(self, token_channels: int = 256, hidden: int = 32) -> None:
        super().__init__()
        require_integer("token_channels", token_channels, 1)
        require_integer("hidden", hidden, 1)
        self.mlp = nn.Sequential(
            nn.Linear(token_channels, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, 2),
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output_token: Tensor) -> Tensor:
        """Output tokens (B, token_channels) -> alpha (B, 2): weights of the deformed and the original features."""
        return self.mlp(output_token).softmax(dim=-1) * self.scale
