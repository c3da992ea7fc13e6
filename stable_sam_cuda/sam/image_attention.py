"""SAM's two attentions between tokens and image features, with the projections of the image folded into the tokens.

With few tokens and many locations, the projections of the image are what an attention costs. Logits, attended
values and outputs are linear in the image features, so a projection can as well be applied on the other side::

    q . (W_k u + b_k)  =  (W_k^T q) . u + q . b_k            sum_n p_n (W_v u_n + b_v)  =  W_v (sum_n p_n u_n) + b_v
    W_o (sum_t p_t v_t) + b_o  =  sum_t p_t (W_o v_t) + b_o

T tokens of h heads give h * T folded rows in place of the projection's ``inner`` columns: less work, and no memory for
the projected image, while h * T <= inner (T <= 16 in SAM). The share of the positional encoding in keys and queries,
``W pe + b``, is the same for all prompts, and comes projected.

Shapes: tokens (B, T, C); image features (B or 1, N, C) of N locations; projections (1, N, inner); logits (B, h, T, N).
"""

import math
from typing import NamedTuple, TypeGuard

import torch
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from stable_sam_cuda.modules.plain_module import all_plain, is_plain


class Projected(NamedTuple):
    """Projections (1, N, inner) of one image, which serve all of its prompts."""

    keys: Tensor  # of the token-to-image attention, positional encoding included
    values: Tensor
    queries: Tensor  # of the image-to-token attention, positional encoding included


def can_fold(attention: nn.Module) -> TypeGuard[Attention]:
    """Whether the attention is SAM's own in all parts, biases too, so that its weights say what it computes."""
    if not is_plain(attention, Attention):
        return False
    layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    return all_plain(layers, nn.Linear) and all(layer.bias is not None for layer in layers)


def attend_to_image(
    attention: Attention, queries: Tensor, features: Tensor, position: Tensor, projected: Projected | None = None
) -> Tensor:
    """``attention(q=queries, k=features + encoding, v=features)``: (B, T, C).

    Args:
        queries: (B, T, C), their positional encoding added.
        features: (B or 1, N, C).
        position: the encoding's projection by ``k_proj``, bias included, (1, N, inner).
        projected: keys and values of ``features`` where they are there already.
    """
    heads, rows = attention.num_heads, scaled(attention, attention.q_proj(queries))
    batch, count, _ = rows.shape
    if projected is not None:
        logits = by_head(rows, heads) @ by_head(projected.keys, heads).transpose(1, 2)
        attended = logits.softmax(dim=-1) @ by_head(projected.values, heads)
        return attention.out_proj(joined(attended, batch))
    logits = _logits(rows, features, attention.k_proj.weight, position, heads)
    mixed = _mix(logits.softmax(dim=-1).flatten(1, 2), features)
    # (h, B * T, C) @ (h, C, d): each head's own rows of W_v.
    mixed = mixed.unflatten(1, (heads, count)).transpose(0, 1).flatten(1, 2)
    values = mixed @ attention.v_proj.weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return attention.out_proj(joined(values, batch) + attention.v_proj.bias)


def add_attention_to_tokens(
    attention: Attention,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    queries: Tensor | None = None,
) -> Tensor:
    """``features + attention(q=features + encoding, k=keys, v=values)``: (B, N, C).

    Args:
        features: (B or 1, N, C).
        keys, values: (B, T, C), of the tokens.
        position: the encoding's projection by ``q_proj``, bias included, (1, N, inner).
        queries: of ``features``, encoding included, (1, N, inner), where they are there already.
    """
    heads = attention.num_heads
    rows, values = scaled(attention, attention.k_proj(keys)), attention.v_proj(values)
    batch, count, _ = rows.shape
    if queries is not None:
        logits = by_head(rows, heads) @ by_head(queries, heads).transpose(1, 2)
        logits = logits.unflatten(1, (batch, count)).transpose(0, 1)
    else:
        logits = _logits(rows, features, attention.q_proj.weight, position, heads)
    shares = logits.softmax(dim=2).flatten(1, 2).transpose(1, 2)
    # A location's shares sum to 1 in each head, so a part of the bias with every row gives the bias.
    outputs = _fold(values, attention.out_proj.weight.t(), heads) + attention.out_proj.bias / heads
    if torch.is_autocast_enabled(features.device.type):
        return features + torch.bmm(shares, outputs)  # the sum in the dtype of features, as in SAM
    return torch.baddbmm(features, shares, outputs)


def scaled(attention: Attention, rows: Tensor) -> Tensor:
    """Rows (B, T, inner) divided by the square root of a head's width."""
    return rows / math.sqrt(attention.internal_dim // attention.num_heads)


def _logits(rows: Tensor, features: Tensor, weight: Tensor, position: Tensor, heads: int) -> Tensor:
    """``rows . (weight u + position)`` by head: (B, h, T, N)."""
    batch, count, _ = rows.shape
    folded = _fold(rows, weight, heads)
    if features.shape[0] == 1:
        logits = (folded.flatten(0, 1) @ features[0].t()).unflatten(0, (batch, heads, count))
    else:
        logits = torch.bmm(folded, features.transpose(1, 2)).unflatten(1, (heads, count))
    of_position = by_head(rows, heads) @ by_head(position, heads).transpose(1, 2)
    return logits + of_position.unflatten(1, (batch, count)).transpose(0, 1)


def _mix(shares: Tensor, features: Tensor) -> Tensor:
    """Shares (B, R, N) of the features' locations: (B, R, C)."""
    if features.shape[0] == 1:
        return (shares.flatten(0, 1) @ features[0]).unflatten(0, shares.shape[:2])
    return torch.bmm(shares, features)


def _fold(rows: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Rows (B, T, inner) through weight (inner, C), head by head: (B, h * T, C)."""
    batch, count, _ = rows.shape
    folded = by_head(rows, heads) @ weight.unflatten(0, (heads, -1))
    return folded.unflatten(1, (batch, count)).transpose(0, 1).flatten(1, 2)


def by_head(rows: Tensor, heads: int) -> Tensor:
    """(B, T, inner) -> (h, B * T, d)."""
    return rows.flatten(0, 1).unflatten(1, (heads, -1)).transpose(0, 1)


def joined(rows: Tensor, batch: int) -> Tensor:
    """(h, B * T, d) -> (B, T, inner)."""
    return rows.transpose(0, 1).flatten(1).unflatten(0, (batch, -1))
