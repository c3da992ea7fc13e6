"""Token-to-image attention over calibrated features that are never written to memory.

SAM's attention has keys K(u + key_pe) and values V(u). Its projections are linear, so they can be absorbed, as decoders
with a latent cache do: K's into the queries before, V's into the pooled features after. What is left over all pixels
is one kernel, `sampled_attention`, that attends from rows of C channels, one for each head and query, straight to u.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_sam_cuda.backends import Backend, choose, choose_for_attention, warn_unfused
from stable_sam_cuda.checks import check_alike, check_batched, check_dtype, check_image, check_max_offset, check_tensors
from stable_sam_cuda.ops import reference
from stable_sam_cuda.ops.autocast import autocast_dtype
from stable_sam_cuda.ops.triton import NoPlanFitsError
from stable_sam_cuda.sampling import sample_with

# Absorption takes heads * T rows of C channels to every pixel: from here on projecting the pixels is cheaper.
MOST_FUSED_QUERIES = 64


def deformable_attention(
    queries: Tensor,
    features: Tensor,
    identity: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    key_pe: Tensor,
    *,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_heads: int,
    max_offset: float,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """SAM's token-to-image attention with deformable sampling and routing inside.

    ::

        u = deformable_sample(features, offsets, identity=identity, alpha=alpha, max_offset=max_offset)
        out = out_proj(attention(q_proj(queries), k_proj(u + key_pe), v_proj(u)))

    with ``num_heads`` heads and logits over the square root of a head's width, as `segment_anything`'s ``Attention``
    has it. This is the attention of Stable-SAM's figure 3a (arXiv 2311.15776), u from figures 3b and 3c.

    Args:
        queries: (B or 1, T, C), the tokens, their positional encoding already added.
        features: (B or 1, C, H, W), what is sampled; channels-last memory is the native one.
        identity: like ``features``.
        offsets: (B or 1, 2, H, W), raw (before tanh); channel 0 is x, channel 1 is y.
        alpha: (B or 1, 2), shares of the sampled and of the identity features.
        key_pe: (B or 1, C, H, W), positional encoding of the pixels.
        q_weight, k_weight, v_weight: (inner, C), as in ``nn.Linear``; q_bias, k_bias, v_bias: (inner,).
        out_weight, out_bias: (C, inner) and (C,).
        num_heads: heads; inner is a multiple of it.
        max_offset: largest displacement s_p along each axis, in pixels of the feature map.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; see `stable_sam_cuda.backends`.

    Returns:
        (B, T, C) with the dtype of ``queries``, or autocast's. Sampling, logits, softmax and sums are float32 (float64
        for float64 inputs) whatever the dtype; the projections of the queries and of the result have the dtype.

    Differentiable in all tensors; the gradient of ``k_bias`` is zero, because a number added to all logits of a query
    does not change their softmax. Only ``backend="reference"`` can be differentiated twice. A NaN offset makes its
    pixel NaN, and so the whole prompt; an infinite one saturates at ``max_offset``.

    For more than 64 queries, with a backend that has no fused kernel, or on a GPU without the resources for Triton's, u
    is sampled first and projected, with one `UnfusedAttentionWarning`. What ``torch.compile`` has made raises an error
    on such a GPU instead.

    Raises:
        TypeError: an argument is not a tensor, or tensors of different or unsupported dtypes were given.
        ValueError: shapes or devices do not fit together, or ``num_heads``, ``max_offset`` or ``backend`` is not valid.
        BackendUnavailableError: the backend asked for by name is not there.
    """
    maps = {"features": features, "identity": identity, "offsets": offsets, "alpha": alpha, "key_pe": key_pe}
    weights = {
        "q_weight": q_weight,
        "q_bias": q_bias,
        "k_weight": k_weight,
        "k_bias": k_bias,
        "v_weight": v_weight,
        "v_bias": v_bias,
        "out_weight": out_weight,
        "out_bias": out_bias,
    }
    batch = _check(queries, maps, weights, num_heads, max_offset)
    dtype = autocast_dtype(queries)
    chosen, fused = choose_for_attention(backend, queries.device, dtype)
    if queries.shape[1] > MOST_FUSED_QUERIES and chosen is not Backend.REFERENCE:
        warn_unfused(f"more than {MOST_FUSED_QUERIES} queries")
        fused = False

    q = F.linear(queries, q_weight, q_bias).unflatten(-1, (num_heads, -1)).expand(batch, -1, -1, -1)
    if fused:
        try:
            heads = _absorbed(chosen, dtype, q, maps, k_weight, v_weight, v_bias, float(max_offset))
            if k_bias.requires_grad and torch.is_grad_enabled():
                heads = heads + k_bias[:0].sum()  # 0, and a gradient of exact zeros
            return F.linear(heads, out_weight, out_bias)
        except NoPlanFitsError as error:
            warn_unfused(str(error))
    # Without the fused kernel the best sampler counts, which may be another backend's.
    chosen = choose(backend, queries.device, dtype)
    heads = _projected(chosen, q, maps, k_weight, k_bias, v_weight, v_bias, float(max_offset))
    return F.linear(heads, out_weight, out_bias)


def _absorbed(
    chosen: Backend,
    dtype: torch.dtype,
    q: Tensor,
    maps: dict[str, Tensor],
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    max_offset: float,
) -> Tensor:
    """Heads side by side, (B, T, inner), of queries q (B, T, heads, width)."""
    _, tokens, heads, width = q.shape
    scaled = q * (1 / math.sqrt(width))
    rows = torch.einsum("bthd,hdc->bhtc", scaled, k_weight.unflatten(0, (heads, -1))).flatten(1, 2)
    arguments: list[Any] = [*(tensor.to(dtype) for tensor in (rows, *maps.values())), max_offset]
    operations = torch.ops.stable_sam_cuda
    if chosen is Backend.REFERENCE:
        pooled, _ = reference.sampled_attention(*arguments)
    elif chosen is Backend.TRITON:
        pooled, _ = operations.sampled_attention_triton(*arguments)
    else:
        pooled, _ = operations.sampled_attention(*arguments)
    pooled = pooled.unflatten(1, (heads, tokens))
    return torch.einsum("bhtc,hdc->bthd", pooled, v_weight.unflatten(0, (heads, -1))).flatten(2) + v_bias


def _projected(
    chosen: Backend,
    q: Tensor,
    maps: dict[str, Tensor],
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    max_offset: float,
) -> Tensor:
    """The same by keys and values of every pixel."""
    features, identity, offsets, alpha, key_pe = maps.values()
    calibrated = sample_with(chosen, features, offsets, identity, alpha, None, max_offset)
    values = calibrated.flatten(2).transpose(1, 2)
    keys = values + key_pe.flatten(2).transpose(1, 2)

    def by_head(projected: Tensor) -> Tensor:
        """(B or 1, H * W, inner) -> (B, heads, H * W, width)."""
        return projected.unflatten(-1, q.shape[2:]).expand(q.shape[0], -1, -1, -1).transpose(1, 2)

    k, v = by_head(F.linear(keys, k_weight, k_bias)), by_head(F.linear(values, v_weight, v_bias))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)


def _check(
    queries: Tensor, maps: dict[str, Tensor], weights: dict[str, Tensor], num_heads: int, max_offset: float
) -> int:
    """The batch B, of inputs that fit together."""
    check_tensors({"queries": queries, **maps, **weights})
    features = maps["features"]
    check_dtype("features", features)
    check_image("features", features)
    _, channels, height, width = features.shape
    if queries.dim() != 3 or queries.shape[2] != channels:
        raise ValueError(f"queries: expected shape (B or 1, T, {channels}), got {tuple(queries.shape)}")
    if height * width == 0 or channels == 0:
        raise ValueError(f"features: expected at least one pixel and one channel, got {tuple(features.shape)}")
    image = ((channels, height, width),)
    expected = {"offsets": ((2, height, width),), "alpha": ((2,),)}
    expected |= {name: image for name in ("features", "identity", "key_pe")}
    batch = check_batched({**maps, "queries": queries}, {**expected, "queries": (tuple(queries.shape[1:]),)}, features)

    inner = weights["q_weight"].shape[0] if weights["q_weight"].dim() > 0 else 0
    shapes: dict[str, tuple[int, ...]]
    shapes = {name: (inner, channels) for name in ("q_weight", "k_weight", "v_weight")}
    shapes |= {name: (inner,) for name in ("q_bias", "k_bias", "v_bias")}
    shapes |= {"out_weight": (channels, inner), "out_bias": (channels,)}
    for name, weight in weights.items():
        check_alike(name, weight, features)
        if tuple(weight.shape) != shapes[name]:
            raise ValueError(f"{name}: expected shape {shapes[name]}, got {tuple(weight.shape)}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an integer, got {type(num_heads).__name__}")
    if num_heads < 1 or inner < 1 or inner % num_heads:
        raise ValueError(f"num_heads: expected a divisor of inner = {inner}, got {num_heads}")
    check_max_offset(max_offset)
    return batch
