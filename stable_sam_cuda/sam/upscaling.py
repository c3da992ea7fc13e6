"""The last part of SAM's mask decoder in channels-last order: upscaling, and the product with the mask tokens.

A transposed convolution of kernel 2 and stride 2 writes four pixels from each, so it is a linear layer with four times
the channels. The pixels stay in that order, (y, x, y', x', y'', x''), through norm and activation, which look at one
pixel each, up to the masks: only these, 32 times smaller than the upscaled features, are put in their place.
"""

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from stable_sam_cuda.modules.plain_module import is_plain
from stable_sam_cuda.sam.pointwise import pointwise_linear

UPSCALING = (nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d, nn.GELU)


def can_upscale(upscaling: nn.Module) -> bool:
    """Whether ``upscaling`` is SAM's own sequence of layers."""
    return (
        is_plain(upscaling, nn.Sequential)
        and len(upscaling) == len(UPSCALING)
        and all(is_plain(layer, kind) for layer, kind in zip(upscaling, UPSCALING, strict=True))
        and all((layer.kernel_size, layer.stride) == ((2, 2), (2, 2)) for layer in (upscaling[0], upscaling[3]))
        and all((layer.padding, layer.dilation, layer.groups) == ((0, 0), (1, 1), 1) for layer in upscaling[::3])
    )


def mask_logits(decoder: MaskDecoder, features: Tensor, mask_tokens: Tensor, masks: tuple[int, ...]) -> Tensor:
    """Image features (B, H, W, C) and all mask tokens (B, 4, C) -> logits (B, M, 4H, 4W) of the M wanted masks."""
    mlps = decoder.output_hypernetworks_mlps
    weights = torch.stack([mlps[index](mask_tokens[:, index]) for index in masks], dim=1)
    batch, height, width, _ = features.shape
    if not can_upscale(decoder.output_upscaling):
        upscaled = decoder.output_upscaling(features.permute(0, 3, 1, 2))
        return (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    first, norm, activation, second, last_activation = decoder.output_upscaling
    features = _double(first, features.flatten(1, 2))
    features = activation(F.layer_norm(features, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    features = last_activation(_double(second, features))
    # In this order of factors the features' gradient comes in their own memory order.
    logits = (features @ weights.transpose(1, 2)).transpose(1, 2)
    logits = logits.reshape(batch, len(masks), height, width, 2, 2, 2, 2)
    return logits.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(batch, len(masks), 4 * height, 4 * width)


def _double(convolution: nn.ConvTranspose2d, features: Tensor) -> Tensor:
    """(B, N, C) -> (B, N * 4, C'): the four pixels (y', x') that each pixel becomes."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = None if convolution.bias is None else convolution.bias.repeat(4)
    doubled = pointwise_linear(features, weight, bias)
    return doubled.unflatten(-1, (4, -1)).flatten(1, 2)
