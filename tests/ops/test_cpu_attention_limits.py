"""The compiled CPU sampled_attention at its limits: NaN, infinities, saturation, nothing at all, misfitting tensors."""

import pytest
import torch
from attention_cases import (
    AttentionCase,
    assert_attention_matches,
    attend_and_differentiate,
    attention_truth,
    make_attention_inputs,
)
from tolerances import Tolerance, assert_matches
from torch import Tensor

pytestmark = pytest.mark.usefixtures("two_threads")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPERATIONS = torch.ops.stable_sam_cuda
EVERY = 63


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_offset_poisons_its_prompt_alone(dtype: torch.dtype) -> None:
    case = AttentionCase("nan", height=7, width=9)
    inputs, grad_pooled = make_attention_inputs(case, dtype)
    expected, _, expected_gradients = attention_truth(inputs, case.max_offset, grad_pooled)
    inputs["offsets"][0, 0, 1, 2] = torch.nan
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention, inputs, case.max_offset, grad_pooled
    )
    assert pooled[0].isnan().all() and logsumexp[0].isnan().all()
    assert_attention_matches("pooled", pooled[1], expected[1], dtype)
    for name, gradient in gradients.items():
        assert gradient[0].isnan().any(), name
        assert_attention_matches(f"grad_{name}", gradient[1], expected_gradients[name][1], dtype)


@pytest.mark.parametrize("max_offset", [1.3, 1e6])
def test_infinite_offsets_saturate_and_read_nothing_outside(max_offset: float) -> None:
    """The maps lie inside NaN-filled buffers, so a read outside them would show."""
    case = AttentionCase("infinite", batch=1, channels=6, height=4, width=5, max_offset=max_offset)
    inputs, grad_pooled = make_attention_inputs(case, torch.float32)
    for name in ("features", "identity", "key_pe"):
        elements = inputs[name].numel()
        buffer = torch.full((3 * elements,), torch.nan)
        inside = buffer[elements + 1 : 2 * elements + 1].view(1, case.height, case.width, case.channels)
        inputs[name] = inside.permute(0, 3, 1, 2).copy_(inputs[name])
    inputs["offsets"].fill_(torch.inf)
    inputs["offsets"][:, :, ::2] = -torch.inf
    inputs["offsets"][:, 0, :, ::2] *= -1
    expected, _, expected_gradients = attention_truth(inputs, max_offset, grad_pooled)
    pooled, _, gradients = attend_and_differentiate(OPERATIONS.sampled_attention, inputs, max_offset, grad_pooled)
    assert_attention_matches("pooled", pooled, expected, torch.float32)
    for name, gradient in gradients.items():
        assert_attention_matches(f"grad_{name}", gradient, expected_gradients[name], torch.float32)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e4),
        (torch.float32, 1e37),
        (torch.float64, 1e150),
        (torch.float16, 3e4),
        (torch.bfloat16, 1e37),
    ],
    ids=str,
)
def test_saturated_heads_are_finite(dtype: torch.dtype, size: float) -> None:
    """One pixel takes all: the output is its u, which rounding of the logits may not change."""
    case = AttentionCase("saturated", batch=1, rows=4, height=9, width=15)
    inputs, grad_pooled = make_attention_inputs(case, dtype)
    inputs["key_pe"].zero_()
    inputs["key_pe"][0, 0, 0, 4] = inputs["key_pe"][0, 1, 8, 0] = 3.0
    for name in ("features", "identity"):
        inputs[name][:, :2] = 0.0
    inputs["query_rows"].zero_()
    inputs["query_rows"][0, ::2, 0] = inputs["query_rows"][0, 1::2, 1] = size
    expected, _, _ = attention_truth(inputs, case.max_offset, grad_pooled)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention, inputs, case.max_offset, grad_pooled
    )
    assert_attention_matches("pooled", pooled, expected, dtype)
    assert_matches("logsumexp", logsumexp, torch.full((1, 4), 3.0 * size, dtype=torch.float64), Tolerance(2**-7, 0.0))
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


def test_logits_of_minus_infinity_take_nothing() -> None:
    """A whole tile of them, the first, must not give the NaN of inf - inf."""
    case = AttentionCase("infinite_logits", batch=1, rows=2, channels=2, height=3, width=48)
    inputs, grad_pooled = make_attention_inputs(case, torch.float32)
    inputs["key_pe"][0, 0, 0] = -3e38
    inputs["query_rows"][:, :, 0] = 1e3
    expected, expected_logsumexp, _ = attention_truth(inputs, case.max_offset, grad_pooled)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention, inputs, case.max_offset, grad_pooled
    )
    assert torch.allclose(pooled.double(), expected, rtol=1e-5)
    assert torch.allclose(logsumexp.double(), expected_logsumexp)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"rows": 0}, {"height": 0}, {"channels": 0}], ids=lambda sizes: f"no_{next(iter(sizes))}"
)
def test_nothing_to_attend_to(sizes: dict[str, int]) -> None:
    case = AttentionCase("empty", **({"batch": 1, "height": 2, "width": 3} | sizes))
    inputs, grad_pooled = make_attention_inputs(case, torch.float32)
    expected, expected_logsumexp, _ = attention_truth(inputs, case.max_offset, grad_pooled)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention, inputs, case.max_offset, grad_pooled
    )
    assert_attention_matches("pooled", pooled, expected, torch.float32)
    assert torch.allclose(logsumexp.double(), expected_logsumexp)
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape and bool((gradient == 0).all()), name


RAW_CALLS: dict[str, tuple[dict[str, Tensor], str]] = {
    "query_rows of 2 axes": ({"query_rows": torch.zeros(5, 8)}, "query_rows: expected 3 dimensions, got 2"),
    "query_rows of another batch": ({"query_rows": torch.zeros(3, 5, 8)}, "query_rows: expected batch 2"),
    "query_rows of other channels": (
        {"query_rows": torch.zeros(2, 5, 7)},
        "query_rows: expected size 8 along axis 2, got 7",
    ),
    "query_rows of another dtype": (
        {"query_rows": torch.zeros(2, 5, 8).double()},
        "query_rows: expected the dtype of features",
    ),
    "key_pe of another size": ({"key_pe": torch.zeros(2, 8, 3, 4)}, "key_pe: expected size 5 along axis 3, got 4"),
    "key_pe of another batch": ({"key_pe": torch.zeros(3, 8, 3, 5)}, "key_pe: expected batch 1 or 2, got 3"),
    "identity of another size": ({"identity": torch.zeros(2, 8, 2, 5)}, "identity: expected size 3 along axis 2"),
    "alpha of 3 columns": ({"alpha": torch.zeros(2, 3)}, "alpha: expected size 2 along axis 1, got 3"),
}


@pytest.mark.parametrize(("change", "message"), RAW_CALLS.values(), ids=RAW_CALLS.keys())
def test_the_raw_operators_refuse_what_would_leave_a_tensor(change: dict[str, Tensor], message: str) -> None:
    inputs, grad_pooled = make_attention_inputs(AttentionCase("good"), torch.float32)
    results = OPERATIONS.sampled_attention(*inputs.values(), 1.0)
    arguments = {**inputs, **change}
    with pytest.raises(RuntimeError, match=message):
        OPERATIONS.sampled_attention(*arguments.values(), 1.0)
    with pytest.raises(RuntimeError, match=message):
        OPERATIONS.sampled_attention_backward(grad_pooled, *arguments.values(), *results, 1.0, EVERY)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("grad_pooled", (2, 4, 8)),
        ("grad_pooled", (1, 5, 8)),
        ("pooled", (2, 5, 7)),
        ("pooled", (2, 5)),
        ("logsumexp", (2, 4)),
        ("logsumexp", (2, 5, 1)),
    ],
)
def test_the_raw_backward_refuses_wrong_results(name: str, shape: tuple[int, ...]) -> None:
    inputs, grad_pooled = make_attention_inputs(AttentionCase("good"), torch.float32)
    pooled, logsumexp = OPERATIONS.sampled_attention(*inputs.values(), 1.0)
    given = {"grad_pooled": grad_pooled, "pooled": pooled, "logsumexp": logsumexp, name: torch.zeros(shape)}
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        OPERATIONS.sampled_attention_backward(
            given["grad_pooled"], *inputs.values(), given["pooled"], given["logsumexp"], 1.0, EVERY
        )
