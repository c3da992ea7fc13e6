"""Every op signature on one screen. Kernels, fakes, autograd and autocast all register against these.

``grad_mask`` of a backward op has bit i set where the gradient of input i (features, offsets, identity,
alpha, amplitude) is asked for; a gradient not asked for comes back empty, with shape (0,).
Gradients of features and identity have their input's shape (summed over prompts where the input's batch
of 1 was broadcast); gradients of offsets, alpha and amplitude have the output's batch.
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

# The compiled op is dispatched by device (CPU: C++, CUDA: CUDA C++); Triton's stands beside it.
SCHEMAS = {
    "deformable_sample": _FORWARD,
    "deformable_sample_backward": _BACKWARD,
    "deformable_sample_triton": _FORWARD,
    "deformable_sample_triton_backward": _BACKWARD,
}

library = torch.library.Library(NAMESPACE, "DEF")
for name, signature in SCHEMAS.items():
    library.define(name + signature)
