"""The head of the offset network as one function: user checks and the choice of a backend."""

import math
from typing import Any

import torch
from torch import Tensor

from stable_sam_cuda.backends import Backend, choose_for_offset_head
from stable_sam_cuda.checks import check_alike, check_dtype, check_image, check_tensors
from stable_sam_cuda.ops import reference
from stable_sam_cuda.ops.autocast import autocast_dtype


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
    parameters = {
        "depthwise_weight": depthwise_weight,
        "depthwise_bias": depthwise_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "pointwise_weight": pointwise_weight,
        "pointwise_bias": pointwise_bias,
    }
    _check(features, parameters, eps)
    dtype = autocast_dtype(features)
    chosen = choose_for_offset_head(backend, features.device, dtype)
    arguments: list[Any] = [*(tensor.to(dtype) for tensor in (features, *parameters.values())), float(eps)]
    if chosen is Backend.REFERENCE:
        return reference.offset_head(*arguments)
    operations = torch.ops.stable_sam_cuda
    operation = operations.offset_head_triton if chosen is Backend.TRITON else operations.offset_head
    return operation(*arguments)


def _check(features: Tensor, parameters: dict[str, Tensor], eps: float) -> None:
    check_tensors({"features": features, **parameters})
    check_dtype("features", features)
    check_image("features", features)
    channels = features.shape[1]
    if channels < 1:
        raise ValueError(f"features: expected at least one channel, got {tuple(features.shape)}")
    weight = parameters["depthwise_weight"]
    size = weight.shape[-1] if weight.dim() > 0 else 0
    if size % 2 == 0 or tuple(weight.shape) != (channels, 1, size, size):
        raise ValueError(
            f"depthwise_weight: expected shape ({channels}, 1, k, k) with k odd, got {tuple(weight.shape)}"
        )
    shapes: dict[str, tuple[int, ...]]
    shapes = dict.fromkeys(("depthwise_bias", "norm_weight", "norm_bias"), (channels,))
    shapes |= {"depthwise_weight": tuple(weight.shape), "pointwise_weight": (2, channels, 1, 1), "pointwise_bias": (2,)}
    for name, parameter in parameters.items():
        check_alike(name, parameter, features)
        if tuple(parameter.shape) != shapes[name]:
            raise ValueError(f"{name}: expected shape {shapes[name]}, got {tuple(parameter.shape)}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps: expected a positive finite number, got {eps}")
