"""What is trained, by name: Stable-SAM's plugin, and the paper's baselines on the same prompts.

Each method freezes SAM but for its own parameters. All but FT-SAM leave the image encoder alone, so that they
work from cached image embeddings.
"""

from collections.abc import Callable

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.sam.stabilize import stabilize

LORA_RANK = 4
ADAPTER_HIDDEN = 16


def _stable(sam: Sam, plugin: DeformableSampler | None) -> None:
    """Stable-SAM: DSP and DRP in the last two-way block, or in both, as the plugin says."""
    stabilize(sam, plugin)


def _prompt_token(sam: Sam, plugin: DeformableSampler | None) -> None:
    """PT-SAM: the output token of the single mask and its hypernetwork."""
    sam.mask_decoder.mask_tokens.requires_grad_(True)
    sam.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(True)


def _decoder(sam: Sam, plugin: DeformableSampler | None) -> None:
    """DT-SAM: the whole mask decoder."""
    sam.mask_decoder.requires_grad_(True)


def _whole(sam: Sam, plugin: DeformableSampler | None) -> None:
    """FT-SAM: all of SAM, image encoder and prompt encoder included."""
    sam.requires_grad_(True)


def _lora(sam: Sam, plugin: DeformableSampler | None) -> None:
    """Low-rank updates of the decoder's query and value projections (the paper leaves rank and place open)."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(config, sam.mask_decoder)


class Adapter(nn.Module):
    """A residual bottleneck behind ``inner``; the identity at initialisation."""

    def __init__(self, inner: nn.Module, channels: int, hidden: int) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(channels, hidden)
        self.up = nn.Linear(hidden, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return inner + self.up(torch.nn.functional.gelu(self.down(inner)))


def _adapter(sam: Sam, plugin: DeformableSampler | None) -> None:
    """An adapter behind the MLP of each two-way block (the paper leaves size and place open)."""
    for block in sam.mask_decoder.transformer.layers:
        block.mlp = Adapter(block.mlp, sam.mask_decoder.transformer_dim, ADAPTER_HIDDEN)
        block.mlp.down.requires_grad_(True)
        block.mlp.up.requires_grad_(True)


METHODS: dict[str, Callable[[Sam, DeformableSampler | None], None]] = {
    "stable": _stable,
    "pt": _prompt_token,
    "dt": _decoder,
    "ft": _whole,
    "lora": _lora,
    "adapter": _adapter,
}


ENCODER_METHODS = ("ft",)  # they train the image encoder, and need it in every step


def check_method(method: str) -> None:
    """
    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")


def install_method(sam: Sam, method: str, plugin: DeformableSampler | None = None) -> dict[str, nn.Parameter]:
    """Freeze ``sam`` in place, add what ``method`` trains, and return it by name.

    Args:
        plugin: for ``stable``, the untrained plugin, where it is to differ from the default one.

    Raises:
        ValueError: the method is unknown, or a plugin is given to a baseline.
    """
    check_method(method)
    if plugin is not None and method != "stable":
        raise ValueError(f"plugin: expected None with method {method!r}, got a DeformableSampler")
    sam.requires_grad_(False)
    METHODS[method](sam, plugin)
    sam.to(sam.device)  # what was added was made on the CPU
    return {name: parameter for name, parameter in sam.named_parameters() if parameter.requires_grad}
