"""Every op signature on one screen. Kernels, fakes, autograd and autocast all register against these.

``grad_mask`` of a backward op has bit i set where the gradient of input i (features, offsets, identity,
alpha, amplitude) is asked for; a gradient not asked for comes back empty, with shape (0,).
Gradients of features and identity have their input's shape (summed over prompts where the input's batch
of 1 was broadcast); gradients of offsets, alpha and amplitude have the output's batch.

``sampled_attention`` attends over u, the calibrated features that ``deformable_sample`` gives, without writing them:
``pooled = softmax(query_rows (u + key_pe)) u`` and the logsumexp of the logits, which only its backward wants and
which passes no gradient. Bits of its ``grad_mask``: query_rows, features, identity, offsets, alpha, key_pe; the
gradient of key_pe has key_pe's batch, all others are as above. The batch is that of query_rows.

Bits of ``offset_head``'s ``grad_mask``: features, then the six parameters in their order; each gradient has the shape
of its input.
"""

import torch

NAMESPACE = "stable_sam_cuda"

_FORWARD = (
    "(Tensor features, Tensor offsets, Tensor? identity, Tensor? alpha, Tensor? amplitude, float max_offset) -> Tensor"
)
_BACKWARD = (
    "(Tensor grad_output, Tensor features, Tensor offsets, Tensor? identity, Tensor? alpha, Tensor? amplitude,"
    " float max_offset, int grad_mask, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_ATTENTION_INPUTS = "Tensor query_rows, Tensor features, Tensor identity, Tensor offsets, Tensor alpha, Tensor key_pe"
_ATTENTION_FORWARD = f"({_ATTENTION_INPUTS}, float max_offset) -> (Tensor pooled, Tensor logsumexp)"
_ATTENTION_BACKWARD = (
    f"(Tensor grad_pooled, {_ATTENTION_INPUTS}, Tensor pooled, Tensor logsumexp, float max_offset, int grad_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_HEAD_INPUTS = (
    "Tensor features, Tensor depthwise_weight, Tensor depthwise_bias, Tensor norm_weight, Tensor norm_bias,"
    " Tensor pointwise_weight, Tensor pointwise_bias, float eps"
)
_HEAD_FORWARD = f"({_HEAD_INPUTS}) -> Tensor"
_HEAD_BACKWARD = (
    f"(Tensor grad_output, {_HEAD_INPUTS}, int grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# The compiled op is dispatched by device (CPU: C++, CUDA: CUDA C++); Triton's stands beside it.
SCHEMAS = {
    "deformable_sample": _FORWARD,
    "deformable_sample_backward": _BACKWARD,
    "deformable_sample_triton": _FORWARD,
    "deformable_sample_triton_backward": _BACKWARD,
    "sampled_attention": _ATTENTION_FORWARD,
    "sampled_attention_backward": _ATTENTION_BACKWARD,
    "sampled_attention_triton": _ATTENTION_FORWARD,
    "sampled_attention_triton_backward": _ATTENTION_BACKWARD,
    "offset_head": _HEAD_FORWARD,
    "offset_head_backward": _HEAD_BACKWARD,
    "offset_head_triton": _HEAD_FORWARD,
    "offset_head_triton_backward": _HEAD_BACKWARD,
}

library = torch.library.Library(NAMESPACE, "DEF")
for name, signature in SCHEMAS.items():
    library.define(name + signature)
