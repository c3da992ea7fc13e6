"""The compiled CPU sampled_attention against the reference in float64, results and gradients, on poisoned memory."""

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
from torch import Tensor

pytestmark = pytest.mark.usefixtures("two_threads")

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
    AttentionCase("one_of_all_but_rows", batch=3, height=2, broadcast=frozenset(ATTENTION_NAMES[1:])),
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
    # Among so many pixels larger logits have a few gradients dwarf the rest.
    check(case, torch.float32, logit_scale=0.25)


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
