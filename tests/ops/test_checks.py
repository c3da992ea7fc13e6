"""Bad input: every error names the argument, what was expected and what came; bad values stay where they are."""

import math

import pytest
import torch
from sample_inputs import Case, by_name, make_grad_output, make_inputs, output_and_gradients
from torch import Tensor

from stable_sam_cuda import BackendUnavailableError, deformable_sample
from stable_sam_cuda.ops import backends, reference

OPERATIONS = torch.ops.stable_sam_cuda


def good() -> dict[str, object]:
    inputs = make_inputs(Case("good", batch=3, channels=4, height=5, width=6, amplitude="channel"), torch.float32)
    return {**inputs, "max_offset": 1.0}


BAD_ARGUMENTS = {
    "features is a list": ({"features": [1.0]}, TypeError, r"features: expected a torch.Tensor, got list"),
    "offsets is None": ({"offsets": None}, TypeError, r"offsets: expected a torch.Tensor, got NoneType"),
    "features is integer": (
        {"features": torch.zeros(3, 4, 5, 6, dtype=torch.int32)},
        TypeError,
        r"features: expected dtype float32.*got torch.int32",
    ),
    "features is complex": (
        {"features": torch.zeros(3, 4, 5, 6, dtype=torch.complex64)},
        TypeError,
        r"features: .*complex",
    ),
    "features has 3 axes": ({"features": torch.zeros(4, 5, 6)}, ValueError, r"features: expected shape \(B, C, H, W\)"),
    "offsets has 1 channel": (
        {"offsets": torch.zeros(3, 1, 5, 6)},
        ValueError,
        r"offsets: expected shape \(B or 1, 2, 5, 6\), got \(3, 1, 5, 6\)",
    ),
    "offsets of another size": ({"offsets": torch.zeros(3, 2, 5, 7)}, ValueError, r"offsets: .*got \(3, 2, 5, 7\)"),
    "offsets of another batch": (
        {"offsets": torch.zeros(2, 2, 5, 6)},
        ValueError,
        r"offsets: expected batch 1 or 3.*got 2",
    ),
    "identity of other channels": ({"identity": torch.zeros(3, 5, 5, 6)}, ValueError, r"identity: .*\(3, 5, 5, 6\)"),
    "identity missing": ({"identity": None}, ValueError, r"identity: expected a tensor like features.*got None"),
    "alpha of 3 columns": (
        {"alpha": torch.zeros(3, 3)},
        ValueError,
        r"alpha: expected shape \(B or 1, 2\), got \(3, 3\)",
    ),
    "alpha of 4 axes": ({"alpha": torch.zeros(3, 2, 1, 1)}, ValueError, r"alpha: expected shape \(B or 1, 2\)"),
    "amplitude of 2 channels": (
        {"amplitude": torch.zeros(3, 2, 5, 6)},
        ValueError,
        r"amplitude: expected shape \(B or 1, 1 or 4, 5, 6\), got \(3, 2, 5, 6\)",
    ),
    "offsets of another dtype": (
        {"offsets": torch.zeros(3, 2, 5, 6, dtype=torch.float64)},
        TypeError,
        r"offsets: expected dtype torch.float32, that of features, got torch.float64",
    ),
    "offsets on another device": (
        {"offsets": torch.zeros(3, 2, 5, 6, device="meta")},
        ValueError,
        r"offsets: expected device cpu, that of features, got meta",
    ),
    "max_offset is a tensor": ({"max_offset": torch.tensor(1.0)}, TypeError, r"max_offset: expected a number.*Tensor"),
    "max_offset is a bool": ({"max_offset": True}, TypeError, r"max_offset: expected a number.*bool"),
    "max_offset is negative": ({"max_offset": -1.0}, ValueError, r"max_offset: expected.*got -1.0"),
    "max_offset is NaN": ({"max_offset": math.nan}, ValueError, r"max_offset: expected.*got nan"),
    "max_offset is infinite": ({"max_offset": math.inf}, ValueError, r"max_offset: expected.*got inf"),
    "no such backend": ({"backend": "gpu"}, ValueError, r"backend: expected one of 'auto', .*got 'gpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    deformable_sample(**good())
    with pytest.raises(error, match=message):
        deformable_sample(**{**good(), **change})


def test_a_backend_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MISSING, backends.Backend.CUDA, "not built: nvcc was not found")
    with pytest.raises(BackendUnavailableError, match="backend 'cuda' is not available: not built: nvcc was not found"):
        deformable_sample(**good(), backend="cuda")


RAW_CALLS = {
    "channels differ": {"identity": torch.zeros(3, 9, 5, 6)},
    "rows differ": {"offsets": torch.zeros(3, 2, 4, 6)},
    "batch differs": {"features": torch.zeros(2, 4, 5, 6)},
    "dtype differs": {"amplitude": torch.zeros(3, 4, 5, 6, dtype=torch.float64)},
    "axes differ": {"alpha": torch.zeros(3, 2, 1)},
    "amplitude channels": {"amplitude": torch.zeros(3, 3, 5, 6)},
    "integers": {"features": torch.zeros(3, 4, 5, 6, dtype=torch.int64)},
}


@pytest.mark.parametrize("change", RAW_CALLS.values(), ids=RAW_CALLS.keys())
def test_the_raw_operators_refuse_what_would_leave_a_tensor(change: dict[str, Tensor]) -> None:
    arguments = {**good(), **change}
    with pytest.raises(RuntimeError, match="expected"):
        OPERATIONS.deformable_sample(*arguments.values())
    with pytest.raises(RuntimeError, match="expected"):
        OPERATIONS.deformable_sample_backward(torch.zeros(3, 4, 5, 6), *arguments.values(), 31, False)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 4, 5, 6), (3, 4, 5, 5), (3, 4, 5), (3, 5, 5, 6)], ids=str)
def test_the_raw_backward_refuses_a_wrong_gradient(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="grad_output: expected"):
        OPERATIONS.deformable_sample_backward(torch.zeros(shape), *good().values(), 31, False)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_nan_offsets_stay_in_their_pixel(backend: str, dtype: torch.dtype) -> None:
    case = Case("nan", batch=2, channels=5, height=4, width=6, max_offset=2.7)
    inputs = make_inputs(case, dtype)
    clean = _sample(inputs, case, backend)
    inputs["offsets"][0, 0, 0, 0] = math.nan  # x alone
    inputs["offsets"][1, 1, 3, 5] = math.nan  # y alone, in the last pixel of all
    output = _sample(inputs, case, backend)
    poisoned = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    poisoned[0, :, 0, 0] = poisoned[1, :, 3, 5] = True
    poisoned = poisoned.expand_as(output)
    assert output[poisoned].isnan().all()
    assert torch.equal(output[~poisoned], clean[~poisoned])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_nan_offsets_reach_only_their_taps(dtype: torch.dtype) -> None:
    case = Case("nan", batch=1, channels=5, height=4, width=6, max_offset=0.5)
    inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
    inputs["offsets"][0, 0, 1, 2] = math.nan
    _, gradients = output_and_gradients(OPERATIONS.deformable_sample, inputs, case.max_offset, grad_output)
    _, expected = output_and_gradients(reference.deformable_sample, inputs, case.max_offset, grad_output)
    for name in ("features", "offsets", "identity"):
        assert torch.equal(gradients[name].isnan(), expected[name].isnan()), name
    assert 0 < int(gradients["features"].isnan().sum()) <= 4 * case.channels


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sign", [1, -1], ids=["inf", "-inf"])
def test_infinite_offsets_saturate(sign: int, backend: str) -> None:
    (case,) = by_name("max_offset_2.7")
    inputs = make_inputs(case, torch.float32)
    large = {**inputs, "offsets": torch.full_like(inputs["offsets"], sign * 50.0)}
    infinite = {**inputs, "offsets": torch.full_like(inputs["offsets"], sign * math.inf)}
    assert torch.equal(_sample(infinite, case, backend), _sample(large, case, backend))
    grad_output = make_grad_output(case, torch.float32)
    _, gradients = output_and_gradients(OPERATIONS.deformable_sample, infinite, case.max_offset, grad_output)
    assert torch.equal(gradients["offsets"], torch.zeros_like(gradients["offsets"]))


def _sample(inputs: dict[str, Tensor | None], case: Case, backend: str) -> Tensor:
    return deformable_sample(**inputs, max_offset=case.max_offset, backend=backend)
