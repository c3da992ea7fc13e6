"""SAM's mask decoder for many prompts of one image, with what does not depend on the prompt computed once.

The results are those of ``segment_anything``'s own forward up to rounding, gradients included, from the same modules
and parameters. A module that is not SAM's own (LoRA, an adapter, anything with hooks) is called as SAM would call it,
and a decoder that is not SAM's own altogether runs its own forward.
"""

import torch
from segment_anything.modeling import MaskDecoder, Sam, TwoWayTransformer
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from stable_sam_cuda.modules.plain_module import is_plain
from stable_sam_cuda.sam.image_attention import Projected, add_attention_to_tokens, attend_to_image
from stable_sam_cuda.sam.image_keys import BlockPosition, Position, position_of, project_image
from stable_sam_cuda.sam.prompt_encoding import dense_pe
from stable_sam_cuda.sam.shared_sampling import SharedSampling, attend_to_shared, share_sampling
from stable_sam_cuda.sam.stable_block import OUTPUT_TOKEN_INDEX, StableTwoWayAttentionBlock, attend_among_tokens
from stable_sam_cuda.sam.upscaling import mask_logits

SINGLE_MASK = (0,)
THREE_MASKS = (1, 2, 3)
ALL_MASKS = (0, 1, 2, 3)


def can_share(decoder: nn.Module) -> bool:
    """Whether ``decoder`` is SAM's own down to its transformer, so that its steps can be taken apart."""
    return is_plain(decoder, MaskDecoder) and is_plain(decoder.transformer, TwoWayTransformer)


def decode(
    sam: Sam, image_embeddings: Tensor, sparse: Tensor, dense: Tensor, masks: tuple[int, ...] = SINGLE_MASK
) -> tuple[Tensor, Tensor]:
    """Mask logits (B, M, 4H, 4W) and predicted IoU (B, M) of B prompts, in the dtype of the mask decoder.

    Args:
        sam: a plain or stabilised SAM.
        image_embeddings: (1, C, H, W) for prompts of one image, or (B, C, H, W), one for each prompt.
        sparse, dense: the prompt encoder's (B, T, C) and (B or 1, C, H, W).
        masks: which of the four masks are wanted: 0 is SAM's single-mask output, 1 to 3 its three.
    """
    decoder, dense = sam.mask_decoder, _unrepeated(dense)
    dtype = next(decoder.parameters()).dtype
    image_embeddings, sparse, dense = image_embeddings.to(dtype), sparse.to(dtype), dense.to(dtype)
    if len(sparse) == 0:
        return _decode_nothing(decoder, image_embeddings, masks)
    if not can_share(decoder):
        image_pe = dense_pe(sam.prompt_encoder, dtype)
        return _decode_as_sam_does(decoder, image_embeddings, image_pe, sparse, dense, masks)
    position = position_of(sam.prompt_encoder, decoder, dtype)
    return decode_shared(decoder, image_embeddings, position, sparse, dense, masks)


def _decode_nothing(decoder: MaskDecoder, image_embeddings: Tensor, masks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The results of no prompt, B = 0; on the graph, so that a backward over them finds nothing to do."""
    height, width = image_embeddings.shape[2:]
    nothing = decoder.mask_tokens.weight.sum() * image_embeddings.new_zeros((0, len(masks)))
    return nothing[..., None, None].expand(0, len(masks), 4 * height, 4 * width), nothing


def decode_shared(
    decoder: MaskDecoder,
    image_embeddings: Tensor,
    position: Position,
    sparse: Tensor,
    dense: Tensor,
    masks: tuple[int, ...] = SINGLE_MASK,
) -> tuple[Tensor, Tensor]:
    """`decode` for a decoder that `can_share` and tensors of its dtype; ``dense`` is (1, C, H, W) where it can be."""
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)
    image = image_embeddings + dense
    features = _channels_last(image)

    tokens, features = _transform(decoder.transformer, tokens, features, position)
    mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
    logits = mask_logits(decoder, features.unflatten(1, image.shape[2:]), mask_tokens, masks)
    scores = decoder.iou_prediction_head(tokens[:, 0])
    # One by one: a list as an index is copied to a GPU each time, which the host waits for and no CUDA graph can hold.
    return logits, torch.stack([scores[:, index] for index in masks], dim=1)


def _decode_as_sam_does(
    decoder: nn.Module,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    masks: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """By the decoder's own forward. It takes one image, so prompts of several go one by one."""
    dense = dense.expand(len(sparse), -1, -1, -1)
    if len(image_embeddings) > 1:
        each = (tensor.split(1) for tensor in (image_embeddings, sparse, dense))
        answers = [
            _decode_as_sam_does(decoder, image, image_pe, tokens, own, masks)
            for image, tokens, own in zip(*each, strict=True)
        ]
        return torch.cat([logits for logits, _ in answers]), torch.cat([scores for _, scores in answers])
    arguments = {
        "image_embeddings": image_embeddings,
        "image_pe": image_pe,
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }
    of_kind = {kind: decoder(**arguments, multimask_output=kind) for kind in {index > 0 for index in masks}}
    chosen = [(of_kind[index > 0], max(index - 1, 0)) for index in masks]
    logits, scores = (torch.stack([answer[part][:, place] for answer, place in chosen], dim=1) for part in (0, 1))
    return logits, scores


def _unrepeated(dense: Tensor) -> Tensor:
    """Without a mask prompt SAM repeats one dense embedding for all prompts: (1, C, H, W) in place of (B, C, H, W)."""
    return dense[:1] if dense.shape[0] > 1 and dense.stride(0) == 0 else dense


def _channels_last(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); PyTorch's fast transposition is that of matrices."""
    if len(image) == 1:
        return image[0].flatten(1).t().contiguous()[None]
    return image.flatten(2).transpose(1, 2).contiguous()


def _transform(
    transformer: TwoWayTransformer, tokens: Tensor, features: Tensor, position: Position
) -> tuple[Tensor, Tensor]:
    """The two-way transformer: tokens (B, T, C) and features (B or 1, N, C) -> tokens and features (B, N, C)."""
    token_pe = tokens
    projected = _project_if_cheaper(transformer.layers[0], tokens, features, position.blocks[0])
    for block, block_position in zip(transformer.layers, position.blocks, strict=True):
        if is_plain(block, TwoWayAttentionBlock, StableTwoWayAttentionBlock):
            tokens, features = _block(block, tokens, token_pe, features, position.encoding, block_position, projected)
        else:
            features = features.expand(len(tokens), -1, -1)
            encoding = position.encoding.expand_as(features)
            tokens, features = block(queries=tokens, keys=features, query_pe=token_pe, key_pe=encoding)
        projected = None
    final = transformer.final_attn_token_to_image
    attended = _attend(final, tokens + token_pe, features, position.encoding, position.final_keys)
    return transformer.norm_final_attn(tokens + attended), features


def _project_if_cheaper(
    block: nn.Module, tokens: Tensor, features: Tensor, position: BlockPosition
) -> Projected | SharedSampling | None:
    """Projections of the one image that all prompts share, unless folding them into the prompts is less work."""
    if len(features) > 1 or not is_plain(block, TwoWayAttentionBlock, StableTwoWayAttentionBlock):
        return None
    if position.keys is None or position.queries is None:
        return None
    attention = block.cross_attn_token_to_image
    if tokens.shape[0] * tokens.shape[1] * attention.num_heads <= attention.internal_dim:
        return None
    if isinstance(block, StableTwoWayAttentionBlock):
        return share_sampling(block, features, position.keys, position.queries) if block.can_share() else None
    return project_image(block, features, position.keys, position.queries)


def _block(
    block: TwoWayAttentionBlock,
    tokens: Tensor,
    token_pe: Tensor,
    features: Tensor,
    encoding: Tensor,
    position: BlockPosition,
    projected: Projected | SharedSampling | None,
) -> tuple[Tensor, Tensor]:
    """`TwoWayAttentionBlock.forward`, or that of a stabilised block."""
    tokens = attend_among_tokens(block, tokens, token_pe)

    queries, output_token = tokens + token_pe, tokens[:, OUTPUT_TOKEN_INDEX]
    stable = isinstance(block, StableTwoWayAttentionBlock)
    if isinstance(projected, SharedSampling):
        attended = attend_to_shared(
            block.cross_attn_token_to_image, queries, block.plugin.alpha(output_token), projected
        )
    elif stable and block.attends_fused(queries):
        attended = block.attend_fused(queries, features, encoding, output_token)
    else:
        seen = block.calibrate(features, output_token) if stable else features
        to_image = block.cross_attn_token_to_image
        attended = _attend(to_image, queries, seen, encoding, position.keys, projected)
    tokens = block.norm2(tokens + attended)

    tokens = block.norm3(tokens + block.mlp(tokens))

    to_token = block.cross_attn_image_to_token
    if position.queries is None:
        attended = to_token(q=(features + encoding).expand(len(tokens), -1, -1), k=tokens + token_pe, v=tokens)
        return tokens, block.norm4(features + attended)
    image_queries = None if projected is None else projected.queries
    summed = add_attention_to_tokens(to_token, features, tokens + token_pe, tokens, position.queries, image_queries)
    return tokens, block.norm4(summed)


def _attend(
    attention: nn.Module,
    queries: Tensor,
    features: Tensor,
    encoding: Tensor,
    position: Tensor | None,
    projected: Projected | None = None,
) -> Tensor:
    if position is not None:
        return attend_to_image(attention, queries, features, position, projected)
    features = features.expand(len(queries), -1, -1)
    return attention(q=queries, k=features + encoding, v=features)
