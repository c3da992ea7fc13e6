"""`deformable_sample`: features at learned offsets, blended with the identity.

All tensors are (B, C, H, W): B prompts, C channels, an H x W feature map. Channels-last memory is the native one;
contiguous NCHW tensors are accepted and converted. A batch of 1 broadcasts against B for every argument.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stable_sam_cuda.ops import backends, reference
from stable_sam_cuda.ops.autocast import autocast_dtype, cast_for_autocast
from stable_sam_cuda.ops.backends import Backend
from stable_sam_cuda.ops.checks import check_batched, check_image, check_max_offset, check_tensors
from stable_sam_cuda.ops.register import empty_gradients, empty_image, mask_of, register, wanted_gradients


class SampleInputs(NamedTuple):
    """The inputs of the op, in the order of its schema."""

    features: Tensor
    offsets: Tensor
    identity: Tensor | None
    alpha: Tensor | None
    amplitude: Tensor | None
    max_offset: float


def deformable_sample(
    features: Tensor,
    offsets: Tensor,
    *,
    identity: Tensor | None = None,
    alpha: Tensor | None = None,
    amplitude: Tensor | None = None,
    max_offset: float,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Sample features at learned offsets and blend the result with the identity, in one pass.

    ::

        out[b,c,y,x] = alpha[b,0] * amplitude[b,c,y,x] * bilinear(features[b,c]; X, Y) + alpha[b,1] * identity[b,c,y,x]
        X = clamp(x + max_offset * tanh(offsets[b,0,y,x]), 0, W - 1);  Y likewise with offsets[b,1] and H

    This is deformable sampling (DSP) and dynamic routing (DRP) of Stable-SAM, figures 3b and 3c of arXiv 2311.15776.

    Args:
        features: (B or 1, C, H, W), what is sampled.
        offsets: (B or 1, 2, H, W), raw (before tanh); channel 0 is x, channel 1 is y.
        identity: like ``features``; needed where ``alpha`` is given, and without ``alpha`` of no effect.
        alpha: (B or 1, 2), shares of the sampled and of the identity features; (1, 0) where absent.
        amplitude: (B or 1, 1 or C, H, W), factor on the sampled features; 1 where absent.
        max_offset: largest displacement s_p along each axis, in pixels of the feature map.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; see `stable_sam_cuda.backends`.

    Returns:
        (B, C, H, W) with the dtype of ``features``, or autocast's. Coordinates, weights and sums are float32
        (float64 for float64 inputs) whatever the dtype. The compiled kernels return channels-last memory.

    Differentiable in all five tensors. The clamp passes no gradient where it binds; at integer locations the derivative
    is the right-hand one. The kernels are deterministic forward and backward, bit for bit, whether or not
    ``torch.use_deterministic_algorithms(True)`` asks for it: the gradient of the features is gathered, nothing is added
    atomically. Only ``backend="reference"`` can be differentiated twice. A NaN offset makes its pixel NaN in every
    channel; an infinite one saturates at ``max_offset``.

    Raises:
        TypeError: an argument is not a tensor, or tensors of different or unsupported dtypes were given.
        ValueError: shapes or devices do not fit together, or ``max_offset`` or ``backend`` is not valid.
        BackendUnavailableError: the backend asked for by name is not there.
    """
    inputs = SampleInputs(features, offsets, identity, alpha, amplitude, max_offset)
    check(inputs)
    if alpha is None and identity is not None:
        inputs = inputs._replace(identity=None)
    choice = backends.choose("deformable_sample", backend, features.device, autocast_dtype(features))
    return run(choice.backend, inputs)


def check(inputs: SampleInputs) -> None:
    """Raise what `deformable_sample` raises for inputs that do not fit together."""
    tensors = inputs._asdict()
    max_offset = tensors.pop("max_offset")
    for name in ("identity", "alpha", "amplitude"):
        if tensors[name] is None:
            del tensors[name]
    check_tensors(tensors)
    channels, height, width = check_image("features", inputs.features)
    if inputs.alpha is not None and inputs.identity is None:
        raise ValueError("identity: expected a tensor like features, because alpha is given, got None")
    image = ((channels, height, width),)
    expected = {
        "features": image,
        "offsets": ((2, height, width),),
        "identity": image,
        "alpha": ((2,),),
        "amplitude": ((1, height, width), (channels, height, width)),
    }
    check_batched(tensors, expected, inputs.features)
    check_max_offset(max_offset)


def run(backend: Backend, inputs: SampleInputs) -> Tensor:
    """Sample by a backend that was chosen, from inputs that were checked: (B, C, H, W)."""
    arguments = cast_for_autocast(inputs)
    if backend is Backend.REFERENCE:
        return reference.deformable_sample(*arguments)
    if backend is Backend.TRITON:
        return torch.ops.stable_sam_cuda.deformable_sample_triton(*arguments)
    return torch.ops.stable_sam_cuda.deformable_sample(*arguments)


_INPUTS = "Tensor features, Tensor offsets, Tensor? identity, Tensor? alpha, Tensor? amplitude, float max_offset"
SCHEMA = f"({_INPUTS}) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor grad_output, {_INPUTS}, int grad_mask, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*arguments: Any) -> Tensor:
    *tensors, _ = arguments
    features, *_ = tensors
    (batch,) = torch.broadcast_shapes(*[tensor.shape[:1] for tensor in tensors if tensor is not None])
    return empty_image(features, (batch, *features.shape[1:]))


def _fake_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, grad_mask, _ = arguments
    features, _, identity, alpha, amplitude, _ = SampleInputs(*inputs)
    batch, _, height, width = grad_output.shape
    makers = (
        partial(empty_image, features, features.shape),
        partial(features.new_empty, (batch, 2, height, width)),
        None if identity is None else partial(empty_image, features, identity.shape),
        None if alpha is None else partial(features.new_empty, (batch, 2)),
        None if amplitude is None else partial(empty_image, features, (batch, *amplitude.shape[1:])),
    )
    return empty_gradients(grad_mask, features, makers)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_offset = inputs
    ctx.save_for_backward(*tensors)


def _backward(operation: Any, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[:-1]
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = operation(grad_output, *inputs, ctx.max_offset, mask_of(wanted), deterministic)
    return (*wanted_gradients(gradients, inputs, wanted), None)


register(
    "deformable_sample",
    schema=SCHEMA,
    backward_schema=BACKWARD_SCHEMA,
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
)
