"""Contestants of the attention benchmark: the plugin with the attention it feeds, its steps, and plain SAM's."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention_shapes import HEAD, HEADS, MAX_OFFSET, PROJECTION, LayerTensors, Size
from sampler_providers import eager as eager_sampler
from torch import Tensor

import stable_sam_cuda

Step = Callable[[LayerTensors], Tensor]
OWN = "fused"


def project(tensors: LayerTensors) -> LayerTensors:
    """With x*, a matrix product over channels-last pixels."""
    pixels = tensors.features.permute(0, 2, 3, 1)
    projected = F.linear(pixels, tensors.projection_weight, tensors.projection_bias)
    return tensors._replace(projected=projected.permute(0, 3, 1, 2))


def eager_head(tensors: LayerTensors) -> Tensor:
    """What one writes in PyTorch."""
    depthwise, bias, norm_weight, norm_bias, pointwise, pointwise_bias = tensors.head
    channels, padding = tensors.projected.shape[1], depthwise.shape[-1] // 2
    hidden = F.conv2d(tensors.projected, depthwise, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    hidden = F.gelu(F.layer_norm(hidden, (channels,), norm_weight, norm_bias, 1e-6))
    return F.linear(hidden, pointwise.flatten(1), pointwise_bias).permute(0, 3, 1, 2)


def attend(tensors: LayerTensors, features: Tensor, *, fused_softmax: bool) -> Tensor:
    """SAM's attention of tokens to pixels, with its two projections of each pixel."""
    values = features.flatten(2).transpose(1, 2)
    keys = values + tensors.key_pe.flatten(2).transpose(1, 2)

    def by_head(tensor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(tensor, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q = by_head(tensors.queries, tensors.q_weight, tensors.q_bias)
    k = by_head(keys, tensors.k_weight, tensors.k_bias)
    v = by_head(values, tensors.v_weight, tensors.v_bias)
    if fused_softmax:
        heads = F.scaled_dot_product_attention(q, k, v)
    else:
        heads = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v
    return F.linear(heads.transpose(1, 2).flatten(2), tensors.out_weight, tensors.out_bias)


def eager_attention(tensors: LayerTensors) -> Tensor:
    """Sampled by grid_sample, blended, attended to."""
    calibrated = eager_sampler(tensors.projected, tensors.offsets, tensors.features, tensors.alpha, MAX_OFFSET)
    return attend(tensors, calibrated, fused_softmax=False)


def eager_layer(tensors: LayerTensors) -> Tensor:
    tensors = project(tensors)
    return eager_attention(tensors._replace(offsets=eager_head(tensors)))


def plain(tensors: LayerTensors) -> Tensor:
    """SAM without a plugin."""
    return attend(tensors, tensors.features, fused_softmax=False)


def plain_sdpa(tensors: LayerTensors) -> Tensor:
    return attend(tensors, tensors.features, fused_softmax=True)


def own_head(tensors: LayerTensors, backend: str | None = None) -> Tensor:
    chosen = backend or _backend(tensors)
    return stable_sam_cuda.offset_head(tensors.projected, *tensors.head, backend=chosen)


def own_attention(tensors: LayerTensors, backend: str | None = None) -> Tensor:
    maps = (tensors.projected, tensors.features, tensors.offsets, tensors.alpha, tensors.key_pe)
    options = {"num_heads": HEADS, "max_offset": MAX_OFFSET, "backend": backend or _backend(tensors)}
    return stable_sam_cuda.deformable_attention(tensors.queries, *maps, **tensors.attention, **options)


def own_layer(tensors: LayerTensors, backend: str | None = None) -> Tensor:
    """One matrix product, the offset head, sampling and attention in one."""
    tensors = project(tensors)
    return own_attention(tensors._replace(offsets=own_head(tensors, backend)), backend)


def _backend(tensors: LayerTensors) -> str:
    """On a GPU Triton's kernels, which are what is measured; in a rehearsal whatever serves the CPU."""
    return "triton" if tensors.features.device.type == "cuda" else "auto"


def compiled_layer() -> Step:
    torch._dynamo.reset()
    return torch.compile(eager_layer, dynamic=False, fullgraph=True)


class Operation(NamedTuple):
    """What contestants compute alike."""

    truth: Step  # in float64
    trained: tuple[str, ...]  # tensors whose gradients are timed
    maps: dict[str, int]  # image-sized tensors, fewest that are read or written
    flops: Callable[[Size], float]  # of the forward, fewest: a multiply-add is 2; norms and softmax are not counted


def projection_flops(size: Size) -> float:
    return 2 * size.channels * size.map_elements


def head_flops(size: Size) -> float:
    """25 taps of the depthwise convolution, two offsets."""
    return 2 * (25 + 2) * size.map_elements


def pooling_flops(size: Size) -> float:
    """Attention with its projections absorbed: each head and token is a row, which meets every pixel twice."""
    return 2 * 2 * HEADS * size.tokens * size.map_elements


def attention_flops(size: Size) -> float:
    """4 taps and a blend, then the rows."""
    return 10 * size.map_elements + pooling_flops(size)


# Forward the projection moves 2 maps, the head 1, the attention 2. Backward the attention moves 4 (x and x* read, both
# gradients written), the head 2, the projection 4 (the gradient of x* and x read; the gradient of x* again, that of x).
OPERATIONS = {
    "layer": Operation(
        lambda tensors: own_layer(tensors, "reference"),
        ("features", "alpha", *PROJECTION, *HEAD),
        {"forward": 5, "backward": 10},
        lambda size: projection_flops(size) + head_flops(size) + attention_flops(size),
    ),
    "plain": Operation(plain, ("queries", "features"), {"forward": 1, "backward": 2}, pooling_flops),
    "offset_head": Operation(
        lambda tensors: own_head(tensors, "reference"),
        ("projected", *HEAD),
        {"forward": 1, "backward": 2},
        head_flops,
    ),
    "attention": Operation(
        lambda tensors: own_attention(tensors, "reference"),
        ("features", "alpha", "projected", "offsets"),
        {"forward": 2, "backward": 4},
        attention_flops,
    ),
}


class Contestant(NamedTuple):
    operation: str
    provider: str
    make: Callable[[], Step]  # called to be made, because compiling takes long and may fail


def contestants(with_compile: bool) -> list[Contestant]:
    """In the order in which time is given to them."""
    steps = {
        ("layer", OWN): own_layer,
        ("plain", "eager"): plain,
        ("plain", "sdpa"): plain_sdpa,
        ("layer", "eager"): eager_layer,
        ("offset_head", OWN): own_head,
        ("attention", OWN): own_attention,
        ("offset_head", "eager"): eager_head,
        ("attention", "eager"): eager_attention,
    }
    made = [Contestant(*names, lambda step=step: step) for names, step in steps.items()]
    return [*made, Contestant("layer", "torch.compile", compiled_layer)] if with_compile else made
