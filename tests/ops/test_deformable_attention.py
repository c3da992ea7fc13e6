"""The public `deformable_attention`: by every backend the same, by which kernels, and what it says of bad input."""

import warnings

import pytest
import torch
from attention_cases import (
    ATTENTION_NAMES,
    AttentionCase,
    assert_attention_matches,
    attention_weights,
    make_attention_inputs,
)
from torch import Tensor

from stable_sam_cuda import Backend, UnfusedAttentionWarning, deformable_attention
from stable_sam_cuda.ops import backends
from stable_sam_cuda.ops.backends import Choice
from stable_sam_cuda.ops.deformable_attention import MOST_FUSED_QUERIES

CHANNELS, INNER = 16, 8


def arguments(tokens: int = 3, **options: int) -> dict[str, object]:
    case = AttentionCase("public", rows=tokens, channels=CHANNELS, height=3, **options)
    inputs, _ = make_attention_inputs(case, torch.float32)
    maps = {name: inputs[name] for name in ATTENTION_NAMES[1:]}
    numbers = {"num_heads": 2, "max_offset": 1.5}
    return {"queries": inputs["query_rows"], **maps, **attention_weights(CHANNELS, INNER), **numbers}


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning was given yet."""
    monkeypatch.setattr(backends, "told", set())


@pytest.mark.filterwarnings("ignore::stable_sam_cuda.backends.UnfusedAttentionWarning")
@pytest.mark.parametrize("tokens", [3, 65])
def test_the_attention_of_sam(tokens: int) -> None:
    """Through the public function, weights and all, against its own reference backend; fused, and beyond 64 queries."""
    outputs = [deformable_attention(**arguments(tokens), backend=backend) for backend in ("cpu", "reference")]
    assert_attention_matches("output", outputs[0], outputs[1], torch.float32)


@pytest.mark.parametrize("shared", ["queries", "features", "offsets", "alpha"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_argument_may_be_one_for_all_prompts(backend: str, shared: str) -> None:
    given = arguments()
    given[shared] = given[shared][:1]
    expanded = {**given, shared: given[shared].expand(2, *given[shared].shape[1:])}
    output = deformable_attention(**given, backend=backend)
    assert output.shape == (2, 3, CHANNELS)
    assert_attention_matches("output", output, deformable_attention(**expanded, backend=backend), torch.float32)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_keys_bias_has_a_gradient_of_zeros(backend: str) -> None:
    given = arguments()
    given["k_bias"].requires_grad_()
    (gradient,) = torch.autograd.grad(deformable_attention(**given, backend=backend).sum(), given["k_bias"])
    assert torch.equal(gradient, torch.zeros(INNER))


CHOICES = {
    "nothing but plain PyTorch": (Choice(Backend.REFERENCE, None), 3, None),
    "no fused kernel": (Choice(Backend.CPU, None), 3, "backend 'cpu' has no fused kernel for it"),
    "too many queries": (Choice(Backend.CPU, Backend.CPU), MOST_FUSED_QUERIES + 1, "more than 64 queries"),
    "as many as there may be": (Choice(Backend.CPU, Backend.CPU), MOST_FUSED_QUERIES, None),
    "many queries by the reference": (Choice(Backend.REFERENCE, Backend.REFERENCE), MOST_FUSED_QUERIES + 1, None),
}


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize(("choice", "tokens", "said"), CHOICES.values(), ids=CHOICES)
def test_sampling_first_is_told_once(
    choice: Choice, tokens: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(backends, "choose", lambda operation, *_: (asked.append(operation), choice)[1])
    given = arguments(tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [deformable_attention(**given) for _ in range(2)]
    assert asked == ["deformable_attention"] * 2, "one choice a call"
    assert [str(one.message).split(": ")[-1] for one in caught] == ([said] if said else [])
    assert all(one.category is UnfusedAttentionWarning and one.filename == __file__ for one in caught)
    monkeypatch.undo()
    for output in outputs:
        assert_attention_matches("output", output, deformable_attention(**given, backend="reference"), torch.float32)


BAD_ARGUMENTS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "queries is a list": ({"queries": [1.0]}, TypeError, r"queries: expected a torch.Tensor, got list"),
    "out_bias is None": ({"out_bias": None}, TypeError, r"out_bias: expected a torch.Tensor, got NoneType"),
    "queries of 2 axes": (
        {"queries": torch.zeros(3, 16)},
        ValueError,
        r"queries: expected shape \(B or 1, T, 16\), got \(3, 16\)",
    ),
    "queries of another batch": (
        {"queries": torch.zeros(3, 3, 16)},
        ValueError,
        r"queries: expected batch 1 or 2, as the tensors before it have, got 3",
    ),
    "features of integers": (
        {"features": torch.zeros(2, 16, 3, 5, dtype=torch.int64)},
        TypeError,
        r"features: expected dtype float32.*got torch.int64",
    ),
    "no pixels": ({"features": torch.zeros(2, 16, 0, 5)}, ValueError, r"features: expected at least one pixel"),
    "key_pe of another size": (
        {"key_pe": torch.zeros(1, 16, 3, 4)},
        ValueError,
        r"key_pe: expected shape \(B or 1, 16, 3, 5\), got \(1, 16, 3, 4\)",
    ),
    "alpha of 3 columns": ({"alpha": torch.zeros(2, 3)}, ValueError, r"alpha: expected shape \(B or 1, 2\)"),
    "k_weight of another width": (
        {"k_weight": torch.zeros(4, 16)},
        ValueError,
        r"k_weight: expected shape \(8, 16\), got \(4, 16\)",
    ),
    "out_weight transposed": ({"out_weight": torch.zeros(8, 16)}, ValueError, r"out_weight: expected shape \(16, 8\)"),
    "q_weight is a number": ({"q_weight": torch.tensor(1.0)}, ValueError, r"q_weight: expected shape \(0, 16\)"),
    "v_bias of another dtype": ({"v_bias": torch.zeros(8).double()}, TypeError, r"v_bias: .*got torch.float64"),
    "num_heads does not divide": ({"num_heads": 3}, ValueError, r"num_heads: expected a divisor of inner = 8, got 3"),
    "num_heads is a bool": ({"num_heads": True}, TypeError, r"num_heads: expected an integer, got bool"),
    "max_offset is negative": ({"max_offset": -1.0}, ValueError, r"max_offset: expected.*got -1.0"),
    "no such backend": ({"backend": "gpu"}, ValueError, r"backend: expected one of 'auto', .*got 'gpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    deformable_attention(**arguments())
    with pytest.raises(error, match=message):
        deformable_attention(**{**arguments(), **change})


def test_one_graph_by_torch_compile() -> None:
    given: dict[str, object] = arguments()
    compiled = torch.compile(lambda: deformable_attention(**given, backend="cpu"), fullgraph=True, backend="aot_eager")
    output: Tensor = compiled()
    assert_attention_matches("output", output, deformable_attention(**given, backend="reference"), torch.float32)
