"""Gradients of every op: what is saved, which gradients are asked for, and the error of a double backward."""

from typing import Any

import torch
from torch import Tensor

from stable_sam_cuda.ops.schema import NAMESPACE


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


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "deformable_sample: the compiled and Triton backends cannot be differentiated twice; "
        'use backend="reference" for gradients of gradients'
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


for variant in ("deformable_sample", "deformable_sample_triton"):
    torch.library.register_autograd(
        f"{NAMESPACE}::{variant}", _backward_through(f"{variant}_backward"), setup_context=_save_inputs
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::{variant}_backward", _refuse_double_backward, setup_context=_save_nothing
    )
