"""The compiled CPU sampled_attention against the reference in float64, results and gradients, on poisoned memory."""

import os
import subprocess
import sys

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
from tolerances import Tolerance, assert_matches
from torch import Tensor

import stable_sam_cuda

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPERATIONS = torch.ops.stable_sam_cuda
EVERY = 63
SHARED = frozenset({"features", "identity", "key_pe"})
# A tile has 48 pixels, a block 64 rows, a block of the products 6 rows and 1 to 4 vectors, a split of one prompt a
# sixteenth of its tiles.
CASES = [
    AttentionCase("plain", height=5, width=7),
    AttentionCase("several_tiles", rows=9, height=11, width=13),
    AttentionCase("several_splits", batch=1, rows=3, height=41, width=43),
    AttentionCase("few_splits_many_prompts", batch=17, rows=5, channels=32, height=9, width=11),
    AttentionCase("56_rows", batch=1, rows=56, channels=20, height=4, width=13),
    AttentionCase("65_rows", batch=1, rows=65, height=5, width=7),
    AttentionCase("136_rows", batch=2, rows=136, channels=33, height=5, width=7, broadcast=SHARED),
    AttentionCase("sam_channels", batch=1, rows=64, channels=256, height=7, width=8),
    AttentionCase("several_chunks_of_channels", batch=1, rows=3, channels=150, height=3, width=3),
    AttentionCase("one_channel", channels=1, height=2, width=3),
    AttentionCase("17_channels", channels=17),
    AttentionCase("one_row", rows=1),
    AttentionCase("two_pixels", height=1, width=2),
    AttentionCase("one_column", height=53, width=1),
    AttentionCase("wide", batch=1, rows=9, channels=32, height=2, width=135, max_offset=4.0),
    AttentionCase("one_image", batch=3, broadcast=SHARED),
    AttentionCase("one_image_for_20", batch=20, rows=2, height=9, width=9, broadcast=SHARED),
    AttentionCase("one_of_all_else", batch=3, height=3, broadcast=frozenset({"offsets", "alpha", "key_pe"})),
    AttentionCase("one_features", batch=3, broadcast=frozenset({"features"})),
    AttentionCase("one_identity", batch=3, broadcast=frozenset({"identity"})),
    AttentionCase("contiguous", layout="contiguous", height=2, broadcast=frozenset({"key_pe"})),
    AttentionCase("strided", layout="strided", height=2),
]


def by_name(*names: str) -> list[AttentionCase]:
    return [case for case in CASES if case.name in names]


def check(case: AttentionCase, dtype: torch.dtype, logit_scale: float = 1.0) -> None:
    inputs, grad_pooled = make_attention_inputs(case, dtype)
    inputs["query_rows"] *= logit_scale
    expected, expected_logsumexp, expected_gradients = attention_truth(inputs, case.max_offset, grad_pooled)
    pooled, logsumexp, gradients = attend_and_differentiate(
        OPERATIONS.sampled_attention, inputs, case.max_offset, grad_pooled
    )
    assert pooled.dtype == dtype and logsumexp.dtype == torch.promote_types(dtype, torch.float32)
    assert_attention_matches("pooled", pooled, expected, dtype)
    assert_attention_matches("logsumexp", logsumexp, expected_logsumexp, logsumexp.dtype)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_attention_matches(f"grad_{name}", gradient, expected_gradients[name], dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_match_the_reference(case: AttentionCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("broadcast", [frozenset(), SHARED], ids=["each", "shared"])
def test_prompts_beyond_one_group(broadcast: frozenset[str]) -> None:
    """The gradient of u, 7.7 MB a prompt, is written for four prompts at a time."""
    case = AttentionCase("groups", batch=5, rows=4, channels=1024, height=40, width=47, broadcast=broadcast)
    check(
        case, torch.float32, logit_scale=0.25
    )  # among so many pixels larger logits have a few gradients dwarf the rest


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("broadcast", [frozenset(), SHARED], ids=["each", "shared"])
def test_only_gradients_asked_for_are_computed(broadcast: frozenset[str]) -> None:
    case = AttentionCase("asked", broadcast=broadcast)
    inputs, grad_pooled = make_attention_inputs(case, torch.float32)
    results = OPERATIONS.sampled_attention(*inputs.values(), case.max_offset)

    def backward(grad_mask: int) -> tuple[Tensor, ...]:
        return OPERATIONS.sampled_attention_backward(
            grad_pooled, *inputs.values(), *results, case.max_offset, grad_mask
        )

    everything = backward(EVERY)
    for grad_mask in range(EVERY):
        for bit, gradient in enumerate(backward(grad_mask)):
            if grad_mask >> bit & 1:
                assert torch.equal(gradient, everything[bit]), ATTENTION_NAMES[bit]
            else:
                assert gradient.shape == (0,), ATTENTION_NAMES[bit]


@pytest.mark.parametrize("broadcast", [frozenset(), SHARED], ids=["each", "shared"])
def test_gradcheck(broadcast: frozenset[str]) -> None:
    case = AttentionCase("small", rows=3, channels=3, height=2, width=3, broadcast=broadcast)
    inputs, _ = make_attention_inputs(case, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *tensors: OPERATIONS.sampled_attention(*tensors, case.max_offset)[0], leaves)


def test_opcheck() -> None:
    case = AttentionCase("opcheck", height=2, width=2, broadcast=frozenset({"identity", "key_pe"}))
    inputs, grad_pooled = make_attention_inputs(case, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPERATIONS.sampled_attention.default, (*leaves, 1.0), test_utils=tests)
    plain = [leaf.detach() for leaf in leaves]
    results = OPERATIONS.sampled_attention(*plain, 1.0)
    for grad_mask in (0, 21, EVERY):
        arguments = (grad_pooled, *plain, *results, 1.0, grad_mask)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(OPERATIONS.sampled_attention_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", by_name("several_splits", "136_rows", "one_image_for_20"), ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs, grad_pooled = make_attention_inputs(case, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            pooled, logsumexp, gradients = attend_and_differentiate(
                OPERATIONS.sampled_attention, inputs, case.max_offset, grad_pooled
            )
            results.append([pooled, logsumexp, *gradients.values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(first, again) for first, again in zip(results[0], other, strict=True))


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
    assert torch.allclose(pooled.double(), expected, rtol=1e-2)
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


@pytest.mark.filterwarnings("ignore::stable_sam_cuda.backends.UnfusedAttentionWarning")
@pytest.mark.parametrize("tokens", [3, 65])
def test_the_attention_of_sam(tokens: int) -> None:
    """Through the public function, weights and all, against its own reference backend; fused, and beyond 64 queries."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, inner, heads = 16, 8, 2
    inputs, _ = make_attention_inputs(AttentionCase("sam", channels=channels, height=3), torch.float32)
    weights = {f"{name}_weight": normal(inner, channels) for name in "qkv"} | {"out_weight": normal(channels, inner)}
    weights |= {f"{name}_bias": normal(inner) for name in "qkv"} | {"out_bias": normal(channels)}
    arguments = (normal(2, tokens, channels), *[inputs[name] for name in ATTENTION_NAMES[1:]])
    outputs = [
        stable_sam_cuda.deformable_attention(*arguments, **weights, num_heads=heads, max_offset=1.5, backend=backend)
        for backend in ("cpu", "reference")
    ]
    assert_attention_matches("output", outputs[0], outputs[1], torch.float32)


ON_ONE_INSTRUCTION_SET = """
import sys
sys.path[:0] = ["tests", "tests/ops"]
import torch
import test_cpu_attention as tests
from stable_sam_cuda import _extension

for case in tests.by_name("several_tiles", "136_rows", "sam_channels", "one_channel", "17_channels", "one_image"):
    for dtype in tests.DTYPES:
        tests.check(case, dtype)
tests.test_saturated_heads_are_finite(torch.float32, 1e37)
tests.test_a_nan_offset_poisons_its_prompt_alone(torch.float32)
print(_extension.cpu_instruction_set())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "allowed"), [("default", {"baseline"}), ("avx2", {"baseline", "avx2"})])
def test_every_instruction_set_is_exact(capability: str, allowed: set[str]) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_INSTRUCTION_SET], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in allowed
