"""What SAM's mask decoder computes from the image and its positional encoding alone, whatever the prompt."""

from typing import NamedTuple

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor

from stable_sam_cuda.modules.plain_module import is_plain
from stable_sam_cuda.sam.image_attention import Projected, can_fold
from stable_sam_cuda.sam.memo import Memo
from stable_sam_cuda.sam.prompt_encoding import dense_pe


class BlockPosition(NamedTuple):
    """The encoding's projections (1, N, inner), biases included; None for an attention that is not SAM's own."""

    keys: Tensor | None  # by k_proj of the token-to-image attention
    queries: Tensor | None  # by q_proj of the image-to-token attention


class Position(NamedTuple):
    """The positional encoding of the image and its projections by every attention of a mask decoder."""

    image_pe: Tensor  # (1, C, H, W), as `PromptEncoder.get_dense_pe` gives it
    encoding: Tensor  # (1, N, C)
    blocks: tuple[BlockPosition, ...]
    final_keys: Tensor | None


def project_position(decoder: MaskDecoder, image_pe: Tensor) -> Position:
    """Project the encoding (1, C, H, W); differentiable in the decoder's parameters."""
    encoding = image_pe.flatten(2).transpose(1, 2).contiguous()
    blocks = []
    for block in decoder.transformer.layers:
        to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        keys = to_image.k_proj(encoding) if can_fold(to_image) else None
        blocks.append(BlockPosition(keys, to_token.q_proj(encoding) if can_fold(to_token) else None))
    final = decoder.transformer.final_attn_token_to_image
    return Position(image_pe, encoding, tuple(blocks), final.k_proj(encoding) if can_fold(final) else None)


def project_image(block: TwoWayAttentionBlock, features: Tensor, key_pe: Tensor, query_pe: Tensor) -> Projected:
    """Keys, values and queries of image features (1, N, C), by two attentions that are SAM's own.

    key_pe, query_pe: `BlockPosition`'s keys and queries.
    """
    to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
    return Projected(
        keys=key_pe + features @ to_image.k_proj.weight.t(),
        values=to_image.v_proj(features),
        queries=query_pe + features @ to_token.q_proj.weight.t(),
    )


_positions: Memo[Position] = Memo()


def position_of(prompt_encoder: PromptEncoder, decoder: MaskDecoder, dtype: torch.dtype) -> Position:
    """`project_position` of the encoder's dense positional encoding in ``dtype``, kept between calls (see `memo`).

    On a CPU that takes some 50 microseconds against 20 milliseconds. On a GPU it saves some twenty launches, for
    a frozen decoder; one that trains, or is captured in a CUDA graph, is projected anew.
    """

    def compute() -> Position:
        return project_position(decoder, dense_pe(prompt_encoder, dtype))

    inputs = _inputs(prompt_encoder, decoder)
    if inputs is None or torch.compiler.is_compiling():
        return compute()
    return _positions.get(decoder, (tuple(prompt_encoder.image_embedding_size), dtype), inputs, compute)


def _inputs(prompt_encoder: PromptEncoder, decoder: MaskDecoder) -> tuple[Tensor, ...] | None:
    """All tensors that the position follows from; None where it cannot or must not be kept."""
    transformer = decoder.transformer
    final, blocks = transformer.final_attn_token_to_image, transformer.layers
    to_image = [block.cross_attn_token_to_image for block in blocks]
    to_token = [block.cross_attn_image_to_token for block in blocks]
    if not (is_plain(prompt_encoder, PromptEncoder) and is_plain(prompt_encoder.pe_layer, PositionEmbeddingRandom)):
        return None
    if not all(can_fold(attention) for attention in (final, *to_image, *to_token)):
        return None
    projections = (final.k_proj, *(each.k_proj for each in to_image), *(each.q_proj for each in to_token))
    matrix = prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    inputs = (matrix, *(parameter for module in projections for parameter in (module.weight, module.bias)))
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return None if tracked else inputs
