"""How a run begins: the untrained model, or another run's weights."""

from pathlib import Path

import torch
from segment_anything.modeling import Sam

from stable_sam_cuda.sam.lite import new_sam_lite, set_image_size
from stable_sam_cuda.training.backbone import load_imagenet_weights
from stable_sam_cuda.training.checkpoint import load_weights


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
