"""The operations as functions: user checks and the choice of a backend, nothing else.

All tensors are (B, C, H, W): B prompts, C channels, an H x W feature map. Channels-last memory is the native one;
contiguous NCHW tensors are accepted and converted. A batch of 1 broadcasts against B for every argument.
"""

import math
from functools import partial

import torch
from torch import Tensor

from stable_sam_cuda.backends import Backend, choose
from stable_sam_cuda.ops import reference
from stable_sam_cuda.ops.autocast import autocast_dtype, cast_for_autocast

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Beyond it float32 does not tell neighbouring pixels apart.
_LARGEST_MAX_OFFSET = float(2**24)


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
    _check(features, offsets, identity, alpha, amplitude, max_offset)
    if alpha is None:
        identity = None
    dtype = autocast_dtype(features)
    chosen = choose(backend, features.device, dtype)
    max_offset = float(max_offset)
    if chosen is Backend.REFERENCE:
        cast = partial(cast_for_autocast, dtype=dtype)
        return reference.deformable_sample(
            features.to(dtype), offsets.to(dtype), cast(identity), cast(alpha), cast(amplitude), max_offset
        )
    operations = torch.ops.stable_sam_cuda
    operation = operations.deformable_sample_triton if chosen is Backend.TRITON else operations.deformable_sample
    return operation(features, offsets, identity, alpha, amplitude, max_offset)


def _check(
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
) -> None:
    tensors = {"features": features, "offsets": offsets}
    optional = {"identity": identity, "alpha": alpha, "amplitude": amplitude}
    tensors.update((name, tensor) for name, tensor in optional.items() if tensor is not None)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if features.dtype not in _DTYPES:
        raise TypeError(f"features: expected dtype float32, float16, bfloat16 or float64, got {features.dtype}")
    if features.dim() != 4:
        raise ValueError(f"features: expected shape (B, C, H, W), got {tuple(features.shape)}")
    if alpha is not None and identity is None:
        raise ValueError("identity: expected a tensor like features, because alpha is given, got None")

    _, channels, height, width = features.shape
    image = ((channels, height, width),)
    expected = {
        "features": image,
        "offsets": ((2, height, width),),
        "identity": image,
        "alpha": ((2,),),
        "amplitude": ((1, height, width), (channels, height, width)),
    }
    batch = 1
    for name, tensor in tensors.items():
        _check_alike(name, tensor, features)
        if tensor.dim() == 0 or tuple(tensor.shape[1:]) not in expected[name]:
            raise ValueError(f"{name}: expected shape {_describe(expected[name])}, got {tuple(tensor.shape)}")
        own_batch = tensor.shape[0]
        if own_batch != 1 and batch not in (1, own_batch):
            raise ValueError(f"{name}: expected batch 1 or {batch}, as the tensors before it have, got {own_batch}")
        batch = batch if own_batch == 1 else own_batch

    if isinstance(max_offset, bool) or not isinstance(max_offset, (int, float)):
        raise TypeError(f"max_offset: expected a number of pixels, got {type(max_offset).__name__}")
    if not (math.isfinite(max_offset) and 0 <= max_offset <= _LARGEST_MAX_OFFSET):
        raise ValueError(f"max_offset: expected a finite number of pixels from 0 to 2**24, got {max_offset}")


def _check_alike(name: str, tensor: Tensor, features: Tensor) -> None:
    if tensor.device != features.device:
        raise ValueError(f"{name}: expected device {features.device}, that of features, got {tensor.device}")
    if tensor.dtype != features.dtype:
        if tensor.dtype in _DTYPES and torch.is_autocast_enabled(features.device.type):
            return  # autocast makes them alike
        raise TypeError(f"{name}: expected dtype {features.dtype}, that of features, got {tensor.dtype}")


def _describe(expected: tuple[tuple[int, ...], ...]) -> str:
    """((1, 5), (8, 5)) -> '(B or 1, 1 or 8, 5)'."""
    axes = [" or ".join(map(str, dict.fromkeys(sizes))) for sizes in zip(*expected, strict=True)]
    return f"({', '.join(['B or 1', *axes])})"
