"""The operations as functions: user checks and the choice of a backend, nothing else.

All tensors are (B, C, H, W): B prompts, C channels, an H x W feature map. Channels-last memory is the native one;
contiguous NCHW tensors are accepted and converted. A batch of 1 broadcasts against B for every argument.
"""

from torch import Tensor

from stable_sam_cuda.attention import deformable_attention
from stable_sam_cuda.backends import Backend, choose
from stable_sam_cuda.checks import check_batched, check_dtype, check_image, check_max_offset, check_tensors
from stable_sam_cuda.offsets import offset_head
from stable_sam_cuda.ops.autocast import autocast_dtype
from stable_sam_cuda.sampling import sample_with

__all__ = ["deformable_attention", "deformable_sample", "offset_head"]


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
    chosen = choose(backend, features.device, autocast_dtype(features))
    return sample_with(chosen, features, offsets, identity, alpha, amplitude, float(max_offset))


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
    check_tensors(tensors)
    check_dtype("features", features)
    check_image("features", features)
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
    check_batched(tensors, expected, features)
    check_max_offset(max_offset)
