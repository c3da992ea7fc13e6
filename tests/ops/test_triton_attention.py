"""Triton's sampled_attention against the reference in float64: compiled on a GPU, else in Triton's interpreter.

The interpreter runs each operation of each program in Python, so the cases are small.
"""

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
from stable_sam_cuda.kernels import launch
from stable_sam_cuda.kernels.attention import backward as attention_backward
from stable_sam_cuda.kernels.attention import backward_kernels
from stable_sam_cuda.kernels.attention import forward as attention_forward
from tolerances import Tolerance, assert_matches
from torch import Tensor

import stable_sam_cuda
from stable_sam_cuda import kernels
from stable_sam_cuda.ops import libraries

DEVICE = "cpu" if libraries.triton_interprets() else "cuda"
OPERATIONS = torch.ops.stable_sam_cuda
EVERY = 63
CASES = [
    AttentionCase("plain", height=5, width=7),
    AttentionCase("56_rows", batch=1, rows=56, channels=20, height=4, width=5),
    AttentionCase("130_rows", batch=1, rows=130, height=2, width=3),
    AttentionCase("several_chunks", batch=1, rows=3, channels=150, height=3, width=3),
    AttentionCase("one_channel", channels=1, height=2, width=3),
    AttentionCase("two_pixels", height=1, width=2),
    AttentionCase("wide", batch=1, height=2, width=35, max_offset=4.0),
    AttentionCase("one_image", batch=3, broadcast=frozenset({"features", "identity", "key_pe"})),
    AttentionCase("one_of_all_else", batch=3, height=3, broadcast=frozenset({"offsets", "alpha", "key_pe"})),
    AttentionCase("one_of_all_but_rows", batch=3, height=2, broadcast=frozenset(ATTENTION_NAMES[1:])),
    AttentionCase("contiguous", layout="contiguous", height=2, broadcast=frozenset({"key_pe"})),
    AttentionCase("strided", layout="strided", height=2),
]
HALF_CASES = [case for case in CASES if case.name in ("56_rows", "130_rows", "one_image")]


def by_name(name: str) -> AttentionCase:
    return next(case for case in CASES if case.name == name)


def assert_close(name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32) -> None:
    cut_off = dtype == torch.bfloat16 and libraries.triton_interprets()  # where the GPU rounds
    assert_attention_matches(name, actual, truth, dtype, 2.0 if cut_off else 1.0)


def check(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs, grad_pooled = make_attention_inputs(case, dtype, DEVICE)
    expected, expected_logsumexp, expected_gradients = attention_truth(inputs, case.max_offset, grad_pooled)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention_triton, inputs, case.max_offset, grad_pooled
    )
    assert pooled.dtype == dtype and logsumexp.dtype == torch.float32
    assert_close("pooled", pooled, expected, dtype)
    assert_close("logsumexp", logsumexp, expected_logsumexp, dtype)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(f"grad_{name}", gradient, expected_gradients[name], dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_reference(case: AttentionCase) -> None:
    check(case, torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_types_match_the_reference(case: AttentionCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("splits", [1, 5])
def test_any_number_of_shares_gives_the_same_result(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of 5 x 17 pixels has 6 tiles or more in each kernel: 5 shares of 2 leave less or nothing to the last."""

    def split(programs: int, tiles: int, resident: int, device: launch.Device) -> tuple[int, int]:
        assert tiles >= 6
        of_each = -(-tiles // splits)
        return -(-tiles // of_each), of_each

    monkeypatch.setattr(attention_forward, "split_evenly", split)
    monkeypatch.setattr(backward_kernels, "split_evenly", split)
    check(AttentionCase("shares", batch=1, rows=4, height=5, width=17), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["one_image", "one_of_all_else"])
def test_prompts_one_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where their temporaries are too large to be held together."""
    monkeypatch.setattr(attention_backward, "BYTES_AT_A_TIME", 1)
    check(by_name(name), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("broadcast", [(), ("features", "identity", "key_pe")], ids=["each", "shared"])
def test_only_gradients_asked_for_are_computed(broadcast: tuple[str, ...]) -> None:
    case = AttentionCase("asked", height=2, width=3, broadcast=frozenset(broadcast))
    inputs, grad_pooled = make_attention_inputs(case, torch.float32, DEVICE)
    results = kernels.sampled_attention(*inputs.values(), case.max_offset)

    def backward(grad_mask: int) -> tuple[Tensor, ...]:
        return kernels.sampled_attention_backward(grad_pooled, *inputs.values(), *results, case.max_offset, grad_mask)

    everything = backward(EVERY)
    for grad_mask in (0, 1, 2, 4, 8, 16, 32):
        for bit, gradient in enumerate(backward(grad_mask)):
            if grad_mask >> bit & 1:
                assert torch.equal(gradient, everything[bit]), ATTENTION_NAMES[bit]
            else:
                assert gradient.shape == (0,), ATTENTION_NAMES[bit]


def test_a_nan_offset_poisons_its_prompt_alone() -> None:
    case = AttentionCase("nan", height=3, width=3)
    inputs, grad_pooled = make_attention_inputs(case, torch.float32, DEVICE)
    expected, _, expected_gradients = attention_truth(inputs, case.max_offset, grad_pooled)
    inputs["offsets"][0, 0, 1, 2] = torch.nan
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention_triton, inputs, case.max_offset, grad_pooled
    )
    assert pooled[0].isnan().all() and logsumexp[0].isnan().all()
    assert_close("pooled", pooled[1], expected[1])
    for name, gradient in gradients.items():
        assert gradient[0].isnan().any(), name
        assert_close(f"grad_{name}", gradient[1], expected_gradients[name][1])


@pytest.mark.parametrize("max_offset", [1.3, 1e6])
def test_infinite_offsets_saturate_and_read_nothing_outside(max_offset: float) -> None:
    """The maps lie inside NaN-filled buffers, so a read outside them would show."""
    case = AttentionCase("infinite", batch=1, channels=6, height=4, width=5, max_offset=max_offset)
    inputs, grad_pooled = make_attention_inputs(case, torch.float32, DEVICE)
    for name in ("features", "identity", "key_pe"):
        elements = inputs[name].numel()
        buffer = torch.full((3 * elements,), torch.nan, device=DEVICE)
        inside = buffer[elements + 1 : 2 * elements + 1].view(1, case.height, case.width, case.channels)
        inputs[name] = inside.permute(0, 3, 1, 2).copy_(inputs[name])
    inputs["offsets"].fill_(torch.inf)
    inputs["offsets"][:, :, ::2] = -torch.inf
    inputs["offsets"][:, 0, :, ::2] *= -1
    expected, _, expected_gradients = attention_truth(inputs, max_offset, grad_pooled)
    pooled, _, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention_triton, inputs, max_offset, grad_pooled
    )
    assert_close("pooled", pooled, expected)
    for name, gradient in gradients.items():
        assert_close(f"grad_{name}", gradient, expected_gradients[name])


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e4), (torch.float32, 1e37), (torch.float16, 3e4), (torch.bfloat16, 1e37)],
    ids=str,
)
def test_saturated_heads_are_finite(dtype: torch.dtype, size: float) -> None:
    """One pixel takes all: the output is its u, which rounding of the logits may not change."""
    case = AttentionCase("saturated", batch=1, rows=4, height=3, width=5)
    inputs, grad_pooled = make_attention_inputs(case, dtype, DEVICE)
    inputs["key_pe"].zero_()
    inputs["key_pe"][0, 0, 0, 4] = inputs["key_pe"][0, 1, 2, 0] = 3.0
    for name in ("features", "identity"):
        inputs[name][:, :2] = 0.0
    inputs["query_rows"].zero_()
    inputs["query_rows"][0, ::2, 0] = inputs["query_rows"][0, 1::2, 1] = size
    expected, _, _ = attention_truth(inputs, case.max_offset, grad_pooled)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention_triton, inputs, case.max_offset, grad_pooled
    )
    assert_close("pooled", pooled, expected, dtype)
    assert_matches("logsumexp", logsumexp, torch.full((1, 4), 3.0 * size), Tolerance(2**-7, 0.0))
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"rows": 0}, {"height": 0}, {"channels": 0}], ids=lambda sizes: f"no_{next(iter(sizes))}"
)
def test_nothing_to_attend_to(sizes: dict[str, int]) -> None:
    case = AttentionCase("empty", **({"batch": 1, "height": 2, "width": 3} | sizes))
    inputs, grad_pooled = make_attention_inputs(case, torch.float32, DEVICE)
    expected, expected_logsumexp, _ = attention_truth(inputs, case.max_offset, grad_pooled)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention_triton, inputs, case.max_offset, grad_pooled
    )
    assert_close("pooled", pooled, expected)
    assert torch.allclose(logsumexp.cpu().double(), expected_logsumexp.cpu())
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape and bool((gradient == 0).all()), name


def test_float64_is_refused() -> None:
    inputs, _ = make_attention_inputs(AttentionCase("double", height=2, width=2), torch.float64, DEVICE)
    with pytest.raises(TypeError, match=r"features must be float32, float16 or bfloat16 .* got torch.float64"):
        OPERATIONS.sampled_attention_triton(*inputs.values(), 1.0)


def test_opcheck() -> None:
    case = AttentionCase("opcheck", height=2, width=2, broadcast=frozenset({"identity", "key_pe"}))
    inputs, grad_pooled = make_attention_inputs(case, torch.float32, DEVICE)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OPERATIONS.sampled_attention_triton.default, (*leaves, 1.0), test_utils=tests)
    plain = [leaf.detach() for leaf in leaves]
    results = kernels.sampled_attention(*plain, 1.0)
    arguments = (grad_pooled, *plain, *results, 1.0, EVERY)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATIONS.sampled_attention_triton_backward.default, arguments, test_utils=tests)


def test_the_attention_of_sam() -> None:
    """Through the public function, weights and all, against its own reference backend."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    channels, inner, heads = 16, 8, 2
    inputs, _ = make_attention_inputs(AttentionCase("sam", channels=channels, height=3), torch.float32, DEVICE)
    weights = {f"{name}_weight": normal(inner, channels) for name in "qkv"} | {"out_weight": normal(channels, inner)}
    weights |= {f"{name}_bias": normal(inner) for name in "qkv"} | {"out_bias": normal(channels)}
    arguments = (normal(2, 3, channels), *[inputs[name] for name in ATTENTION_NAMES[1:]])
    outputs = [
        stable_sam_cuda.deformable_attention(*arguments, **weights, num_heads=heads, max_offset=1.5, backend=backend)
        for backend in ("triton", "reference")
    ]
    assert_close("output", outputs[0], outputs[1])
