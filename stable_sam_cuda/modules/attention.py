"""The attention of tokens over calibrated features, and the choice of its path.

Fused, u is never written: one kernel samples, blends and attends (`deformable_attention`). Sampled, a
`DeformableSampler` writes u, and whatever attention there is follows.
"""

from enum import Enum

import torch
from torch import Tensor

from stable_sam_cuda.modules.plain_module import is_plain
from stable_sam_cuda.modules.sampler import DeformableSampler
from stable_sam_cuda.ops import backends, deformable_attention
from stable_sam_cuda.ops.autocast import autocast_dtype
from stable_sam_cuda.ops.backends import Backend
from stable_sam_cuda.ops.deformable_attention import MOST_FUSED_QUERIES, AttentionInputs, AttentionWeights

# Backends, with whether gradients are asked for, whose fused kernel is slower than sampling first. The decoder's
# benchmarks have found none on the CPU so far.
SLOWER_FUSED: frozenset[tuple[Backend, bool]] = frozenset()


class AttentionPath(str, Enum):
    """How tokens attend to calibrated features: the results are equal up to rounding."""

    FUSED = "fused"
    SAMPLED = "sampled"


def choose_path(
    backend: Backend | str, device: torch.device, dtype: torch.dtype, *, gradients: bool = False
) -> AttentionPath:
    """The faster path of a plugin whose backend this is, for tensors of this device and dtype.

    ``gradients``: whether they are asked for.
    """
    fused = backends.choose("deformable_attention", backend, device, dtype).kernels
    if fused is None or (fused, gradients) in SLOWER_FUSED:
        return AttentionPath.SAMPLED
    return AttentionPath.FUSED


def path_of(sampler: DeformableSampler, queries: Tensor) -> AttentionPath:
    """The path of queries (B, T, C) through this sampler and an attention whose weights are known.

    Fused unless the sampler predicts amplitudes, has hooks or is of another class, which only a call of it heeds, or
    there are too many queries, of which one `UnfusedAttentionWarning` tells.
    """
    if not is_plain(sampler, DeformableSampler) or sampler.amplitude_head is not None:
        return AttentionPath.SAMPLED
    gradients = torch.is_grad_enabled() and (
        queries.requires_grad or any(parameter.requires_grad for parameter in sampler.parameters())
    )
    path = choose_path(sampler.backend, queries.device, autocast_dtype(queries), gradients=gradients)
    if path is AttentionPath.FUSED and queries.shape[1] > MOST_FUSED_QUERIES:
        backends.warn_unfused(f"more than {MOST_FUSED_QUERIES} queries")
        return AttentionPath.SAMPLED
    return path


def attend_fused(
    sampler: DeformableSampler,
    weights: AttentionWeights,
    queries: Tensor,
    image_features: Tensor,
    key_pe: Tensor,
    output_token: Tensor,
) -> Tensor:
    """``attention(q=queries, k=u + key_pe, v=u)`` for the sampler's u, where `path_of` says fused: (B, T, C).

    Args:
        sampler: gives offsets and shares; its own forward is not called.
        weights: of the attention.
        queries: (B, T, C), their positional encoding added.
        image_features: x, (B or 1, C, H, W). key_pe: (B or 1, C, H, W).
        output_token: t_o, (B, token_channels).
    """
    features = image_features.contiguous(memory_format=torch.channels_last)
    projected, offsets = sampler.offset_network(features, sampler.backend)
    inputs = AttentionInputs(
        queries, projected, features, offsets, sampler.alpha(output_token), key_pe, sampler.max_offset
    )
    deformable_attention.check(inputs, weights)
    choice = backends.choose("deformable_attention", sampler.backend, queries.device, autocast_dtype(queries))
    return deformable_attention.run(choice, inputs, weights)
