"""Gradient of an identity that was broadcast over the prompts: the sum over them, in their order."""

import triton
import triton.language as tl

from .launch import NUMBERS, SMALL


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL)
def identity_sum_kernel(
    grad_identity,  # [H * W * C]
    grad_output,  # [B, H * W * C]
    alpha,  # [B, 2]
    elements,
    prompts,
    ALIGNMENT: tl.constexpr,  # divides the elements
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    elements = (elements // ALIGNMENT) * ALIGNMENT
    mask = element < elements
    total = tl.zeros([BLOCK], tl.float32)
    for prompt in range(0, prompts):
        scale = tl.load(alpha + prompt * 2 + 1).to(tl.float32)
        grad = tl.load(grad_output + element, mask=mask, other=0.0)
        total += scale * grad.to(tl.float32)
        grad_output += elements
    tl.store(grad_identity + element, total.to(grad_identity.dtype.element_ty), mask=mask)
