"""A stabilised block's token-to-image attention for many prompts of one image.

In the first block the image features x are the same for all prompts, and so is what the plugin samples from them, s.
Prompts differ in alpha alone, in which keys and values are linear::

    q . (W_k (alpha_1 s + alpha_2 x) + W_k pe + b_k)  =  [alpha_1 q, alpha_2 q, q] . [W_k s, W_k x, W_k pe + b_k]
    sum_n p_n W_v (alpha_1 s_n + alpha_2 x_n)         =  alpha_1 (sum_n p_n W_v s_n) + alpha_2 (sum_n p_n W_v x_n)

So sampling and projections are done once an image. Shapes as in `image_attention`; h heads of width d.
"""

from typing import NamedTuple

import torch
from segment_anything.modeling.transformer import Attention
from torch import Tensor

from stable_sam_cuda.sam.image_attention import by_head, joined, scaled
from stable_sam_cuda.sam.stable_block import StableTwoWayAttentionBlock


class SharedSampling(NamedTuple):
    """Of one image: keys (h, N, 3d) of s, x and the encoding, values (h, N, 2d) of s and x, the latter without bias.

    ``queries`` (1, N, inner) are those of the image-to-token attention, which sees x alone, encoding included.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor


def share_sampling(
    block: StableTwoWayAttentionBlock, features: Tensor, key_pe: Tensor, query_pe: Tensor
) -> SharedSampling:
    """Sample and project image features (1, N, C), for two attentions that are SAM's own.

    key_pe, query_pe: `BlockPosition`'s keys and queries.
    """
    to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
    heads = to_image.num_heads
    both = torch.cat([block.deformed(features), features])  # (2, N, C): s, x
    keys = torch.cat([both @ to_image.k_proj.weight.t(), key_pe])
    values = both @ to_image.v_proj.weight.t()
    queries = query_pe + features @ to_token.q_proj.weight.t()
    return SharedSampling(_side_by_side(keys, heads), _side_by_side(values, heads), queries)


def attend_to_shared(attention: Attention, queries: Tensor, alpha: Tensor, shared: SharedSampling) -> Tensor:
    """``attention(q=queries, k=u + encoding, v=u)`` for ``u = alpha_1 s + alpha_2 x``: (B, T, C).

    Args:
        queries: (B, T, C), their positional encoding added.
        alpha: (B, 2), or (1, 2) for all prompts.
    """
    heads, rows = attention.num_heads, scaled(attention, attention.q_proj(queries))
    batch, _, inner = rows.shape
    of_s, of_x = (share[:, None, None].to(rows.dtype) for share in alpha.unbind(1))
    asked = torch.cat([by_head(of_s * rows, heads), by_head(of_x * rows, heads), by_head(rows, heads)], dim=-1)
    shares = (asked @ shared.keys.transpose(1, 2)).softmax(dim=-1)
    found = shares @ shared.values  # (h, B * T, 2d)
    from_s, from_x = (joined(part, batch) for part in found.split(inner // heads, dim=-1))
    return attention.out_proj(of_s * from_s + of_x * from_x + attention.v_proj.bias)


def _side_by_side(parts: Tensor, heads: int) -> Tensor:
    """(P, N, inner) -> (h, N, P * d): a location's parts of a head behind one another."""
    return parts.unflatten(2, (heads, -1)).permute(2, 1, 0, 3).flatten(2)
