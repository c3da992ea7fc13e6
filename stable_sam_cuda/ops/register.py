"""Registers operations: what all of them do alike, of each the compiled op and Triton's.

The compiled op is dispatched by device (CPU: C++, CUDA: CUDA C++); Triton's, ``{name}_triton``, stands beside it. Each
has a backward op, whose ``grad_mask`` has bit i set where the gradient of input i is asked for; a gradient that is not
comes back empty, with shape (0,). Gradients of maps that prompts may share (features, identity, key_pe) have their
input's shape, summed over prompts; those of what each prompt has (offsets, alpha, amplitude) have the output's batch.

Dense (B, C, H, W) results are channels-last, all others contiguous; compiled and Triton's kernels return exactly what
the fakes say.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stable_sam_cuda.ops import libraries
from stable_sam_cuda.ops.autocast import cast_for_autocast

NAMESPACE = "stable_sam_cuda"

_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    name: str,
    *,
    schema: str,
    backward_schema: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Register an operation under its name, and as Triton's variant.

    Args:
        name: of the operation; that of its C++ kernels and of the functions in `stable_sam_cuda.kernels`.
        schema: signature of the forward op: tensors, some of them optional, and one number behind them.
        backward_schema: signature of the backward op.
        fake: what has shapes, dtypes and strides of the forward's results, for torch.compile and torch.export.
        fake_backward: the same of the backward's.
        setup_context: saves for the backward, as `torch.library.register_autograd` has it.
        backward: the gradients; behind the backward op to call, it takes what `torch.library.register_autograd` gives.
    """
    for variant in (name, f"{name}_triton"):
        qualified, operations = f"{NAMESPACE}::{variant}", getattr(torch.ops, NAMESPACE)
        _library.define(variant + schema)
        _library.define(f"{variant}_backward{backward_schema}")
        torch.library.register_fake(qualified, fake)
        torch.library.register_fake(f"{qualified}_backward", fake_backward)
        by_op = partial(backward, getattr(operations, f"{variant}_backward"))
        torch.library.register_autograd(qualified, by_op, setup_context=setup_context)
        torch.library.register_autograd(f"{qualified}_backward", _refuse_double_backward, setup_context=_save_nothing)
        for device_type in ("cpu", "cuda"):
            _register_autocast(variant, getattr(operations, variant), device_type)
    if libraries.TRITON is not None:
        for key in ("CUDA", "CPU") if libraries.triton_interprets() else ("CUDA",):
            _library.impl(f"{name}_triton", getattr(libraries.TRITON, name), key)
            _library.impl(f"{name}_triton_backward", getattr(libraries.TRITON, f"{name}_backward"), key)


def _register_autocast(name: str, operation: Callable[..., Any], device_type: str) -> None:
    """For whoever calls the op itself: the package's own calls are cast before."""

    def cast_and_run(*inputs: Any) -> Any:
        cast = cast_for_autocast(inputs)
        with torch.autocast(device_type, enabled=False):
            return operation(*cast)

    _library.impl(name, cast_and_run, f"Autocast{device_type.upper()}")


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "deformable_sample, deformable_attention and offset_head: the compiled and Triton backends cannot be "
        "differentiated twice; "
        'use backend="reference" for gradients of gradients'
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def mask_of(wanted: Sequence[bool]) -> int:
    """The ``grad_mask`` that asks for the gradients that are wanted."""
    return sum(1 << bit for bit, needed in enumerate(wanted) if needed)


def wanted_gradients(gradients: Sequence[Any], inputs: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, summed over prompts where the input's batch of 1 was broadcast; else None."""

    def summed(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.sum(0, keepdim=True) if like.shape[0] == 1 and gradient.shape[0] != 1 else gradient

    return [summed(g, t) if needed else None for g, t, needed in zip(gradients, inputs, wanted, strict=True)]


def empty_image(like: Tensor, shape: Sequence[int]) -> Tensor:
    """For fakes: a dense channels-last (B, C, H, W) of this shape."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_gradients(grad_mask: int, like: Tensor, makers: Sequence[Callable[[], Tensor] | None]) -> tuple[Tensor, ...]:
    """For fakes: the gradients that ``grad_mask`` asks for, made by their makers, and empty ones for all others."""
    return tuple(
        make() if make is not None and grad_mask >> bit & 1 else like.new_empty((0,)) for bit, make in enumerate(makers)
    )
