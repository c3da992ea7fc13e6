"""Gradient of an identity that was broadcast over the prompts: the sum over them, in their order."""

import triton
import triton.language as tl


@triton.jit
def identity_sum_kernel(
    grad_identity,  # [H * W * C]
    grad_output,  # [B, H * W * C]
    alpha,  # [1 or B, 2]
    elements,
    prompts,
    alpha_batch_stride,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < elements
    total = tl.zeros([BLOCK], tl.float32)
    for prompt in range(0, prompts):
        scale = tl.load(alpha + prompt * alpha_batch_stride + 1).to(tl.float32)
        grad = tl.load(grad_output + element, mask=mask, other=0.0, eviction_policy="evict_first")
        total += scale * grad.to(tl.float32)
        grad_output += elements
    tl.store(grad_identity + element, total.to(grad_identity.dtype.element_ty), mask=mask)
