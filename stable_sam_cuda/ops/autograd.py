"""Gradients of every op: what is saved, which gradients are asked for, and the error of a double backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stable_sam_cuda.ops import reference
from stable_sam_cuda.ops.schema import NAMESPACE
from stable_sam_cuda.ops.triton import NoPlanFitsError


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_offset = inputs
    ctx.save_for_backward(*tensors)


def _sum_to_batch(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum over prompts where the input's batch of 1 was broadcast."""
    return gradient.sum(0, keepdim=True) if like.shape[0] == 1 and gradient.shape[0] != 1 else gradient


def _backward_through(operation_name: str):
    """The backward of ``operation_name``: one op call for all gradients that are asked for."""

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        grad_mask = sum(1 << bit for bit, needed in enumerate(wanted) if needed)
        gradients = getattr(torch.ops.stable_sam_cuda, operation_name)(
            grad_output, *inputs, ctx.max_offset, grad_mask, torch.are_deterministic_algorithms_enabled()
        )
        summed = [
            _sum_to_batch(g, t) if needed else None for g, t, needed in zip(gradients, inputs, wanted, strict=True)
        ]
        return (*summed, None)

    return backward


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_offset = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients_by_reference(
    grad_pooled: Tensor, inputs: tuple[Tensor, ...], max_offset: float, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """By plain PyTorch, which materialises u; None where not asked for."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(inputs, wanted, strict=True)]
        query_rows, features, identity, offsets, alpha, key_pe = leaves
        pooled, _ = reference.sampled_attention(query_rows, features, identity, offsets, alpha, key_pe, max_offset)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(pooled, asked, grad_pooled))
    return tuple(next(gradients) if needed else None for needed in wanted)


def _attention_backward_through(operation_name: str):
    """As above; the logsumexp passes no gradient."""

    def backward(ctx: Any, grad_pooled: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:6]
        grad_mask = sum(1 << bit for bit, needed in enumerate(wanted) if needed)
        operation = getattr(torch.ops.stable_sam_cuda, operation_name)
        try:
            gradients = operation(grad_pooled, *saved, ctx.max_offset, grad_mask)
        except NoPlanFitsError:  # the GPU refused what the forward had found to fit; it has been said
            gradients = _attention_gradients_by_reference(grad_pooled, saved[:6], ctx.max_offset, wanted)
        summed = [
            _sum_to_batch(g, t) if needed else None for g, t, needed in zip(gradients, saved[:6], wanted, strict=True)
        ]
        return (*summed, None)

    return backward


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _head_backward_through(operation_name: str):
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:7]
        grad_mask = sum(1 << bit for bit, needed in enumerate(wanted) if needed)
        operation = getattr(torch.ops.stable_sam_cuda, operation_name)
        gradients = operation(grad_output, *ctx.saved_tensors, ctx.eps, grad_mask)
        return (*(g if needed else None for g, needed in zip(gradients, wanted, strict=True)), None)

    return backward


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "deformable_sample, deformable_attention and offset_head: the compiled and Triton backends cannot be "
        "differentiated twice; "
        'use backend="reference" for gradients of gradients'
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _register(operation_name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{operation_name}", backward, setup_context=save)
    torch.library.register_autograd(
        f"{NAMESPACE}::{operation_name}_backward", _refuse_double_backward, setup_context=_save_nothing
    )


for variant in ("deformable_sample", "deformable_sample_triton"):
    _register(variant, _backward_through(f"{variant}_backward"), _save_inputs)
for variant in ("sampled_attention", "sampled_attention_triton"):
    _register(variant, _attention_backward_through(f"{variant}_backward"), _save_attention)
for variant in ("offset_head", "offset_head_triton"):
    _register(variant, _head_backward_through(f"{variant}_backward"), _save_head)
