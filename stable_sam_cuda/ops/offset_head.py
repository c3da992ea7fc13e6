"""`offset_head`: what follows the projection in the offset network, as one function."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stable_sam_cuda.ops import backends, reference
from stable_sam_cuda.ops.autocast import autocast_dtype, cast_for_autocast
from stable_sam_cuda.ops.backends import Backend, BackendUnavailableError
from stable_sam_cuda.ops.checks import check_image, check_parameters, check_tensors
from stable_sam_cuda.ops.register import empty_gradients, empty_image, mask_of, register, wanted_gradients


class HeadInputs(NamedTuple):
    """The inputs of the op, in the order of its schema."""

    features: Tensor
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    pointwise_weight: Tensor
    pointwise_bias: Tensor
    eps: float


def offset_head(
    features: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Raw offsets from projected features, in one pass: the hidden channels are never written.

    ::

        hidden = depthwise_conv(features)                            # k x k, zeros beyond the border
        hidden = gelu(layer_norm(hidden over the channels of each pixel))   # by the error function
        out = conv1x1(hidden)                                        # to 2 channels

    This is what follows ``x* = Conv1x1(x)`` in Stable-SAM's offset network, figure 3b of arXiv 2311.15776.

    Args:
        features: (B, C, H, W); channels-last memory is the native one.
        depthwise_weight: (C, 1, k, k), k odd; depthwise_bias: (C,).
        norm_weight, norm_bias: (C,).
        pointwise_weight: (2, C, 1, 1); pointwise_bias: (2,).
        eps: what the norm adds to the variance.
        backend: "auto", "triton", "cpu" or "reference"; see `stable_sam_cuda.backends`. CUDA tensors take Triton's.

    Returns:
        (B, 2, H, W), contiguous, with the dtype of ``features``, or autocast's. Channel 0 is x, channel 1 is y, both
        before tanh. Statistics and sums are float32 (float64 for float64 inputs) whatever the dtype.

    Differentiable in all seven tensors; the backward computes the hidden channels again. The kernels are deterministic
    forward and backward. Only ``backend="reference"`` can be differentiated twice.

    Raises:
        TypeError: an argument is not a tensor, or tensors of different or unsupported dtypes were given.
        ValueError: shapes or devices do not fit together, or ``eps`` or ``backend`` is not valid.
        BackendUnavailableError: the backend asked for by name is not there.
    """
    inputs = HeadInputs(
        features, depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias, eps
    )
    check(inputs)
    return run(_choose(backend, features), inputs)


def check(inputs: HeadInputs) -> None:
    """Raise what `offset_head` raises for inputs that do not fit together."""
    parameters = inputs._asdict()
    eps = parameters.pop("eps")
    check_tensors(parameters)
    features, weight = parameters.pop("features"), inputs.depthwise_weight
    channels, _, _ = check_image("features", features)
    if channels < 1:
        raise ValueError(f"features: expected at least one channel, got {tuple(features.shape)}")
    size = weight.shape[-1] if weight.dim() > 0 else 0
    if size % 2 == 0 or tuple(weight.shape) != (channels, 1, size, size):
        raise ValueError(
            f"depthwise_weight: expected shape ({channels}, 1, k, k) with k odd, got {tuple(weight.shape)}"
        )
    expected = {
        "depthwise_weight": (channels, 1, size, size),
        "depthwise_bias": (channels,),
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "pointwise_weight": (2, channels, 1, 1),
        "pointwise_bias": (2,),
    }
    check_parameters(parameters, expected, features)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps: expected a positive finite number, got {eps}")


def _choose(requested: Backend | str, features: Tensor) -> Backend:
    """The backend with kernels for it: on CUDA that is Triton's; ``auto`` falls back on plain PyTorch."""
    choice = backends.choose("offset_head", requested, features.device, autocast_dtype(features))
    if choice.kernels is not None:
        return choice.kernels
    if requested == Backend.AUTO.value:
        return Backend.REFERENCE
    others = backends.KERNELS["offset_head"].get(features.device.type, ())
    names = ", ".join(repr(other.value) for other in (*others, Backend.REFERENCE))
    raise BackendUnavailableError(
        f"backend {choice.backend.value!r} has no kernels for offset_head; expected one of {names}"
    )


def run(backend: Backend, inputs: HeadInputs) -> Tensor:
    """The offsets (B, 2, H, W) by a backend that was chosen and has kernels for it, from inputs that were checked."""
    arguments = cast_for_autocast(inputs)
    if backend is Backend.REFERENCE:
        return reference.offset_head(*arguments)
    if backend is Backend.TRITON:
        return torch.ops.stable_sam_cuda.offset_head_triton(*arguments)
    return torch.ops.stable_sam_cuda.offset_head(*arguments)


_INPUTS = (
    "Tensor features, Tensor depthwise_weight, Tensor depthwise_bias, Tensor norm_weight, Tensor norm_bias,"
    " Tensor pointwise_weight, Tensor pointwise_bias, float eps"
)
SCHEMA = f"({_INPUTS}) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor grad_output, {_INPUTS}, int grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*arguments: Any) -> Tensor:
    features = HeadInputs(*arguments).features
    batch, _, height, width = features.shape
    return features.new_empty((batch, 2, height, width))


def _fake_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Each gradient has the shape of its input."""
    features, *parameters, _, grad_mask = arguments
    makers = [partial(parameter.new_empty, parameter.shape) for parameter in parameters]
    return empty_gradients(grad_mask, features, [partial(empty_image, features, features.shape), *makers])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(operation: Any, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[:-1]
    gradients = operation(grad_output, *inputs, ctx.eps, mask_of(wanted))
    return (*wanted_gradients(gradients, inputs, wanted), None)


register(
    "offset_head",
    schema=SCHEMA,
    backward_schema=BACKWARD_SCHEMA,
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
)
