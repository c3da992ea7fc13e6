"""Triton's sampled_attention and offset_head on a device, against the reference in float64."""

from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    ATTENTION_NAMES,
    AttentionCase,
    assert_attention_matches,
    attend_and_differentiate,
    attention_truth,
    make_attention_inputs,
)
from head_cases import HeadCase, assert_head_matches, head_truth, make_head_inputs, run_and_differentiate
from torch import Tensor

import stable_sam_cuda
from stable_sam_cuda import Backend, backends
from stable_sam_cuda.ops.backends import choose

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPERATIONS = torch.ops.stable_sam_cuda
HEADS = 8  # rows of one token
ATTENTION = {"channels": 256, "height": 64, "width": 64}
ATTENTION_CASES = [
    *(AttentionCase(f"{tokens}_tokens", rows=HEADS * tokens, **ATTENTION) for tokens in (1, 7, 9, 20, 64)),
    *(AttentionCase(f"{batch}_prompts", batch, HEADS * 7, **ATTENTION) for batch in (1, 5, 64)),
    AttentionCase("one_image", 8, 56, **ATTENTION, broadcast=frozenset({"features", "identity", "key_pe"})),
    AttentionCase("one_of_all_else", 8, 56, **ATTENTION, broadcast=frozenset({"offsets", "alpha", "key_pe"})),
    AttentionCase("one_of_all_but_rows", 8, 56, **ATTENTION, broadcast=frozenset(ATTENTION_NAMES[1:])),
    AttentionCase("far", rows=56, **ATTENTION, max_offset=5.0),
    AttentionCase("odd_sizes", 3, 13, 100, 37, 51, layout="contiguous"),
    AttentionCase("33_channels", 3, 9, 33, 16, 17, layout="strided"),
    AttentionCase("two_pixels", 2, 8, 64, 1, 2),
]
HEAD_CASES = [
    *(HeadCase(f"{batch}_prompts", batch, 256, 64, 64) for batch in (1, 3, 64)),
    *(HeadCase(f"kernel_of_{size}", 2, 256, 32, 32, size) for size in (1, 3, 7, 11)),
    HeadCase("odd_sizes", 3, 100, 37, 51, layout="contiguous"),
    HeadCase("33_channels", 3, 33, 16, 17, layout="strided"),
    HeadCase("512_channels", 2, 512, 20, 24),
    HeadCase("1280_channels", 1, 1280, 9, 8),
    HeadCase("3_channels", 2, 3, 70, 9, eps=0.1),  # the variance of three may be near 0: nothing for float32
    HeadCase("1x1_map", 2, 256, 1, 1),
]


# Kernels of the two half types differ in their conversions alone: a few cases do for one of them.
IN_FLOAT16 = ("7_tokens", "64_tokens", "3_prompts", "odd_sizes")


def with_dtypes(cases: list) -> list[tuple]:
    return [(case, dtype) for case in cases for dtype in DTYPES if dtype != torch.float16 or case.name in IN_FLOAT16]


@pytest.fixture(autouse=True)
def freed_memory() -> None:
    """The reference of 64 prompts takes gigabytes, which other processes that test beside this one may want."""
    torch.cuda.empty_cache()


def test_the_kernels_are_there() -> None:
    assert backends.why_unavailable(Backend.TRITON) is None
    for operation in ("deformable_attention", "offset_head"):
        assert choose(operation, "auto", torch.device("cuda"), torch.bfloat16).kernels is Backend.TRITON


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("case", "dtype"), with_dtypes(ATTENTION_CASES), ids=str)
def test_attention_matches_the_reference(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs, grad_pooled = make_attention_inputs(case, dtype, DEVICE)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention_triton, inputs, case.max_offset, grad_pooled
    )
    # A few prompts at a time in float64; gradients of what prompts share are their sum.
    expected, expected_logsumexp, expected_gradients = [], [], {name: [] for name in inputs}
    for first in range(0, case.batch, 4):
        prompts = slice(first, first + 4)
        few = {name: t if t.shape[0] == 1 else t[prompts] for name, t in inputs.items()}
        true_pooled, true_logsumexp, true_gradients = attention_truth(few, case.max_offset, grad_pooled[prompts])
        expected.append(true_pooled)
        expected_logsumexp.append(true_logsumexp)
        for name, gradient in true_gradients.items():
            expected_gradients[name].append(gradient)
    assert_attention_matches("pooled", pooled, torch.cat(expected), dtype)
    assert_attention_matches("logsumexp", logsumexp, torch.cat(expected_logsumexp), dtype)
    for name, parts in expected_gradients.items():
        shared = inputs[name].shape[0] == 1 and case.batch > 1
        truth = sum(parts[1:], parts[0]) if shared else torch.cat(parts)
        assert_attention_matches(f"grad_{name}", gradients[name], truth, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("case", "dtype"), with_dtypes(HEAD_CASES), ids=str)
def test_the_offset_head_matches_the_reference(case: HeadCase, dtype: torch.dtype) -> None:
    inputs, grad_output = make_head_inputs(case, dtype, DEVICE)
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head_triton, inputs, case.eps, grad_output)
    assert_head_matches("output", output, expected, dtype)
    for name, gradient in gradients.items():
        assert_head_matches(name, gradient, expected_gradients[name], dtype)


def every_kernel(dtype: torch.dtype, batch: int = 3) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Inputs, and a call of both operators, forward and backward, on them."""
    case, head_case = AttentionCase("all", batch, 56, **ATTENTION), HeadCase("all", batch, 256, 64, 64)
    inputs, grad_pooled = make_attention_inputs(case, dtype, DEVICE)
    head_inputs, grad_offsets = make_head_inputs(head_case, dtype, DEVICE)

    def call() -> list[Tensor]:
        results = OPERATIONS.sampled_attention_triton(*inputs.values(), case.max_offset)
        gradients = OPERATIONS.sampled_attention_triton_backward(
            grad_pooled, *inputs.values(), *results, case.max_offset, 0b111111
        )
        output = OPERATIONS.offset_head_triton(*head_inputs.values(), head_case.eps)
        head_gradients = OPERATIONS.offset_head_triton_backward(
            grad_offsets, *head_inputs.values(), head_case.eps, 0b1111111
        )
        return [*results, *gradients, output, *head_gradients]

    return [*inputs.values(), *head_inputs.values()], call


@pytest.mark.parametrize("batch", [1, 16])
def test_every_bit_is_the_same_in_every_run(batch: int) -> None:
    _, call = every_kernel(torch.bfloat16, batch)
    first = call()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


def test_cuda_graphs_capture_and_replay() -> None:
    tensors, call = every_kernel(torch.bfloat16)
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for tensor in tensors:
        tensor.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, call(), strict=True))


def test_work_goes_to_the_current_stream() -> None:
    tensors, call = every_kernel(torch.float32)
    expected, kept = call(), [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would overtake the copies
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        results = call()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_nan_offset_poisons_its_prompt_alone() -> None:
    case = AttentionCase("nan", 3, 56, **ATTENTION)
    inputs, _ = make_attention_inputs(case, torch.bfloat16, DEVICE)
    clean, _ = OPERATIONS.sampled_attention_triton(*inputs.values(), case.max_offset)
    inputs["offsets"][1, 0, 40, 3] = torch.nan
    pooled, logsumexp = OPERATIONS.sampled_attention_triton(*inputs.values(), case.max_offset)
    assert pooled[1].isnan().all() and logsumexp[1].isnan().all()
    assert torch.equal(pooled[::2], clean[::2])


def test_a_nan_pixel_poisons_the_offsets_around_it_alone() -> None:
    inputs, _ = make_head_inputs(HeadCase("nan", 2, 256, 64, 64), torch.bfloat16, DEVICE)
    inputs["features"][1, 7, 30, 2] = torch.nan
    offsets = OPERATIONS.offset_head_triton(*inputs.values(), 1e-6)
    expected = torch.zeros_like(offsets, dtype=torch.bool)
    expected[1, :, 28:33, 0:5] = True
    assert torch.equal(offsets.isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_compile(dtype: torch.dtype) -> None:
    inputs, grad_output = make_head_inputs(HeadCase("compiled", 2, 64, 16, 16), torch.float32, DEVICE)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def head(*tensors: Tensor) -> Tensor:
        return stable_sam_cuda.offset_head(*tensors, backend="triton")

    with torch.autocast("cuda", dtype=dtype):
        plain, compiled = head(*leaves), torch.compile(head, fullgraph=True)(*leaves)
    assert plain.dtype == compiled.dtype == dtype
    assert torch.equal(plain, compiled)
    gradients = [torch.autograd.grad(output, leaves, grad_output.to(dtype)) for output in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    """The last of 2100 prompts, which lies beyond 32-bit addresses, against itself alone."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    batch = 2100  # x 256 x 64 x 64 = 2.2e9
    inputs, grad_output = make_head_inputs(HeadCase("last", 1, 256, 64, 64), torch.bfloat16, DEVICE)
    last, *parameters = inputs.values()
    features = torch.zeros((batch, 64, 64, 256), dtype=torch.bfloat16, device=DEVICE).permute(0, 3, 1, 2)
    features[-1] = last[0]
    output = OPERATIONS.offset_head_triton(features, *parameters, 1e-6)
    assert torch.equal(output[-1], OPERATIONS.offset_head_triton(last, *parameters, 1e-6)[0])
    grads = torch.zeros((batch, 2, 64, 64), dtype=torch.bfloat16, device=DEVICE)
    grads[-1] = grad_output[0]
    gradient = OPERATIONS.offset_head_triton_backward(grads, features, *parameters, 1e-6, 1)[0]
    alone = OPERATIONS.offset_head_triton_backward(grad_output, last, *parameters, 1e-6, 1)[0]
    assert torch.equal(gradient[-1], alone[0]) and not gradient[:-1].any()
