"""`deformable_attention`: token-to-image attention over calibrated features that are never written to memory.

SAM's attention has keys K(u + key_pe) and values V(u). Its projections are linear, so they can be absorbed, as decoders
with a latent cache do: K's into the queries before, V's into the pooled features after. What is left over all pixels
is one kernel, the op `sampled_attention`, that attends from rows of C channels, one for each head and query, straight
to u.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_sam_cuda.ops import backends, deformable_sample, reference
from stable_sam_cuda.ops.autocast import autocast_dtype, cast_for_autocast
from stable_sam_cuda.ops.backends import Backend, Choice
from stable_sam_cuda.ops.checks import check_batched, check_image, check_max_offset, check_parameters, check_tensors
from stable_sam_cuda.ops.libraries import NoPlanFitsError
from stable_sam_cuda.ops.register import empty_gradients, empty_image, mask_of, register, wanted_gradients

# Absorption takes heads * T rows of C channels to every pixel: from here on projecting the pixels is cheaper.
MOST_FUSED_QUERIES = 64


class AttentionInputs(NamedTuple):
    """The inputs of the attention, whose queries are tokens, and of the op `sampled_attention`, in its schema's order.

    The op's are rows of queries that attend to u itself, one for each head and token.
    """

    queries: Tensor
    features: Tensor
    identity: Tensor
    offsets: Tensor
    alpha: Tensor
    key_pe: Tensor
    max_offset: float


class AttentionWeights(NamedTuple):
    """Projections of an attention as `deformable_attention` takes them: weights (inner, C), out (C, inner)."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    num_heads: int


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
    inputs = AttentionInputs(queries, features, identity, offsets, alpha, key_pe, max_offset)
    weights = AttentionWeights(q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias, num_heads)
    check(inputs, weights)
    choice = backends.choose("deformable_attention", backend, queries.device, autocast_dtype(queries))
    return run(choice, inputs, weights)


def check(inputs: AttentionInputs, weights: AttentionWeights) -> None:
    """Raise what `deformable_attention` raises for inputs and weights that do not fit together."""
    maps, parameters = inputs._asdict(), weights._asdict()
    max_offset, num_heads = maps.pop("max_offset"), parameters.pop("num_heads")
    check_tensors(maps)
    check_tensors(parameters)
    queries, features = inputs.queries, inputs.features
    channels, height, width = check_image("features", features)
    if queries.dim() != 3 or queries.shape[2] != channels:
        raise ValueError(f"queries: expected shape (B or 1, T, {channels}), got {tuple(queries.shape)}")
    if height * width == 0 or channels == 0:
        raise ValueError(f"features: expected at least one pixel and one channel, got {tuple(features.shape)}")
    image = ((channels, height, width),)
    maps["queries"] = maps.pop("queries")  # behind the maps, which say what batch is expected
    expected = {
        "features": image,
        "identity": image,
        "offsets": ((2, height, width),),
        "alpha": ((2,),),
        "key_pe": image,
        "queries": (tuple(queries.shape[1:]),),
    }
    check_batched(maps, expected, features)

    inner = weights.q_weight.shape[0] if weights.q_weight.dim() > 0 else 0
    shapes = {f"{name}_weight": (inner, channels) for name in "qkv"} | {f"{name}_bias": (inner,) for name in "qkv"}
    check_parameters(parameters, {**shapes, "out_weight": (channels, inner), "out_bias": (channels,)}, features)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an integer, got {type(num_heads).__name__}")
    if num_heads < 1 or inner < 1 or inner % num_heads:
        raise ValueError(f"num_heads: expected a divisor of inner = {inner}, got {num_heads}")
    check_max_offset(max_offset)


def run(choice: Choice, inputs: AttentionInputs, weights: AttentionWeights) -> Tensor:
    """Attend by what was chosen, fused where there are kernels for it, from inputs that were checked: (B, T, C)."""
    fused = choice.kernels
    if choice.backend is Backend.REFERENCE:
        fused = Backend.REFERENCE  # it computes the same in as many steps
    elif fused is None:
        backends.warn_unfused(f"backend {choice.backend.value!r} has no fused kernel for it")
    tokens = inputs.queries.shape[1]
    if tokens > MOST_FUSED_QUERIES and choice.backend is not Backend.REFERENCE:
        backends.warn_unfused(f"more than {MOST_FUSED_QUERIES} queries")
        fused = None

    q = F.linear(inputs.queries, weights.q_weight, weights.q_bias)
    q = q.unflatten(-1, (weights.num_heads, -1)).expand(_batch_of(inputs), -1, -1, -1)
    if fused is not None:
        try:
            heads = _absorbed(fused, q, inputs, weights)
            if weights.k_bias.requires_grad and torch.is_grad_enabled():
                heads = heads + weights.k_bias[:0].sum()  # 0, and a gradient of exact zeros
            return F.linear(heads, weights.out_weight, weights.out_bias)
        except NoPlanFitsError as error:
            backends.warn_unfused(str(error))
    # Without the fused kernel the best sampler counts, which may be another backend's.
    heads = _projected(choice.backend, q, inputs, weights)
    return F.linear(heads, weights.out_weight, weights.out_bias)


def _batch_of(inputs: AttentionInputs) -> int:
    """B, which any of the tensors may have."""
    for tensor in inputs[:-1]:
        if tensor.shape[0] != 1:
            return tensor.shape[0]
    return 1


def _absorbed(backend: Backend, q: Tensor, inputs: AttentionInputs, weights: AttentionWeights) -> Tensor:
    """Heads side by side, (B, T, inner), of queries q (B, T, heads, width)."""
    _, tokens, heads, width = q.shape
    scaled = q * (1 / math.sqrt(width))
    rows = torch.einsum("bthd,hdc->bhtc", scaled, weights.k_weight.unflatten(0, (heads, -1))).flatten(1, 2)
    pooled = sampled_attention(backend, AttentionInputs(rows, *inputs[1:])).unflatten(1, (heads, tokens))
    by_head = torch.einsum("bhtc,hdc->bthd", pooled, weights.v_weight.unflatten(0, (heads, -1)))
    return by_head.flatten(2) + weights.v_bias


def _projected(backend: Backend, q: Tensor, inputs: AttentionInputs, weights: AttentionWeights) -> Tensor:
    """The same by keys and values of every pixel."""
    _, features, identity, offsets, alpha, key_pe, max_offset = inputs
    sampled = deformable_sample.SampleInputs(features, offsets, identity, alpha, None, max_offset)
    values = deformable_sample.run(backend, sampled).flatten(2).transpose(1, 2)
    keys = values + key_pe.flatten(2).transpose(1, 2)

    def by_head(projected: Tensor) -> Tensor:
        """(B or 1, H * W, inner) -> (B, heads, H * W, width)."""
        return projected.unflatten(-1, q.shape[2:]).expand(q.shape[0], -1, -1, -1).transpose(1, 2)

    k = by_head(F.linear(keys, weights.k_weight, weights.k_bias))
    v = by_head(F.linear(values, weights.v_weight, weights.v_bias))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)


def sampled_attention(backend: Backend, inputs: AttentionInputs) -> Tensor:
    """What rows (B, R, C) get from u by a backend with kernels for it: ``softmax(rows (u + key_pe)) u``, (B, R, C)."""
    arguments = cast_for_autocast(inputs)
    if backend is Backend.REFERENCE:
        return reference.sampled_attention(*arguments)[0]
    if backend is Backend.TRITON:
        return torch.ops.stable_sam_cuda.sampled_attention_triton(*arguments)[0]
    return torch.ops.stable_sam_cuda.sampled_attention(*arguments)[0]


# The second result is the logsumexp of the logits, (B, R), which only the backward wants and which passes no gradient.
# The batch is that of query_rows.
_TENSORS = "Tensor query_rows, Tensor features, Tensor identity, Tensor offsets, Tensor alpha, Tensor key_pe"
SCHEMA = f"({_TENSORS}, float max_offset) -> (Tensor pooled, Tensor logsumexp)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_pooled, {_TENSORS}, Tensor pooled, Tensor logsumexp, float max_offset, int grad_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    rows = AttentionInputs(*arguments).queries
    sums_dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[:2], dtype=sums_dtype)


def _fake_backward(grad_pooled: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, grad_mask = arguments
    rows, features, identity, _, _, key_pe = inputs[:6]
    batch, (height, width) = rows.shape[0], features.shape[2:]
    makers = (
        partial(rows.new_empty, rows.shape),
        partial(empty_image, features, features.shape),
        partial(empty_image, features, identity.shape),
        partial(features.new_empty, (batch, 2, height, width)),
        partial(features.new_empty, (batch, 2)),
        partial(empty_image, features, key_pe.shape),
    )
    return empty_gradients(grad_mask, features, makers)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_offset = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(operation: Any, ctx: Any, grad_pooled: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, _, _ = saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:-1]
    try:
        gradients = operation(grad_pooled, *saved, ctx.max_offset, mask_of(wanted))
    except NoPlanFitsError:  # the GPU refused what the forward had found to fit; it has been said
        gradients = _gradients_by_reference(grad_pooled, inputs, ctx.max_offset, wanted)
    return (*wanted_gradients(gradients, inputs, wanted), None)


def _gradients_by_reference(
    grad_pooled: Tensor, inputs: list[Tensor], max_offset: float, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """By plain PyTorch, which materialises u; None where not asked for."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(inputs, wanted, strict=True)]
        pooled, _ = reference.sampled_attention(*AttentionInputs._make([*leaves, max_offset]))
        gradients = iter(torch.autograd.grad(pooled, [leaf for leaf in leaves if leaf.requires_grad], grad_pooled))
    return [next(gradients) if needed else None for needed in wanted]


register(
    "sampled_attention",
    schema=SCHEMA,
    backward_schema=BACKWARD_SCHEMA,
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
)
