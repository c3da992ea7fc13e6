"""The public `offset_head`: by which kernels, and what it says of bad input."""

import pytest
import torch
from head_cases import HeadCase, make_head_inputs
from torch import Tensor

from stable_sam_cuda import Backend, BackendUnavailableError, OffsetNetwork, offset_head
from stable_sam_cuda.ops import backends, reference
from stable_sam_cuda.ops.backends import Choice

OPERATIONS = torch.ops.stable_sam_cuda


def good() -> dict[str, Tensor]:
    inputs, _ = make_head_inputs(HeadCase("good"), torch.float32, normalised=True)
    return inputs


def test_the_public_function_takes_the_kernels() -> None:
    inputs, _ = make_head_inputs(HeadCase("public", channels=16), torch.float32, normalised=True)
    output = offset_head(**inputs, backend="cpu")
    assert torch.equal(output, OPERATIONS.offset_head(*inputs.values(), 1e-6))
    assert torch.equal(output, offset_head(**inputs))


def test_the_reference_is_the_reference() -> None:
    inputs = good()
    expected = reference.offset_head(*inputs.values(), 0.5)
    assert torch.equal(offset_head(**inputs, eps=0.5, backend="reference"), expected)


def test_auto_without_kernels_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "choose", lambda *_: Choice(Backend.CUDA, None))
    assert torch.equal(offset_head(**good()), reference.offset_head(*good().values(), 1e-6))


@pytest.mark.parametrize("backend", ["cuda", Backend.CUDA], ids=repr)
def test_a_backend_without_kernels_names_those_that_have_them(
    backend: Backend | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "choose", lambda *_: Choice(Backend.CUDA, None))
    with pytest.raises(
        BackendUnavailableError,
        match="backend 'cuda' has no kernels for offset_head; expected one of 'cpu', 'reference'",
    ):
        offset_head(**good(), backend=backend)


BAD_ARGUMENTS = {
    "features is a list": ({"features": [1.0]}, TypeError, r"features: expected a torch.Tensor, got list"),
    "norm_bias is None": ({"norm_bias": None}, TypeError, r"norm_bias: expected a torch.Tensor, got NoneType"),
    "features of integers": (
        {"features": torch.zeros(2, 8, 5, 7, dtype=torch.int32)},
        TypeError,
        r"features: expected dtype float32.*got torch.int32",
    ),
    "features of 3 axes": ({"features": torch.zeros(8, 5, 7)}, ValueError, r"features: expected shape \(B, C, H, W\)"),
    "no channels": ({"features": torch.zeros(2, 0, 5, 7)}, ValueError, r"features: expected at least one channel"),
    "an even kernel": (
        {"depthwise_weight": torch.zeros(8, 1, 4, 4)},
        ValueError,
        r"depthwise_weight: expected shape \(8, 1, k, k\) with k odd, got \(8, 1, 4, 4\)",
    ),
    "a full convolution": (
        {"depthwise_weight": torch.zeros(8, 8, 5, 5)},
        ValueError,
        r"depthwise_weight: .*got \(8, 8, 5, 5\)",
    ),
    "a number for a kernel": ({"depthwise_weight": torch.tensor(1.0)}, ValueError, r"depthwise_weight: .*got \(\)"),
    "3 offsets": (
        {"pointwise_weight": torch.zeros(3, 8, 1, 1)},
        ValueError,
        r"pointwise_weight: expected shape \(2, 8, 1, 1\), got \(3, 8, 1, 1\)",
    ),
    "a short bias": ({"depthwise_bias": torch.zeros(7)}, ValueError, r"depthwise_bias: expected shape \(8,\)"),
    "another dtype": (
        {"norm_weight": torch.zeros(8, dtype=torch.float16)},
        TypeError,
        r"norm_weight: expected dtype torch.float32, that of features, got torch.float16",
    ),
    "another device": (
        {"norm_weight": torch.zeros(8, device="meta")},
        ValueError,
        r"norm_weight: expected device cpu, that of features, got meta",
    ),
    "eps is a bool": ({"eps": True}, TypeError, r"eps: expected a number, got bool"),
    "eps is zero": ({"eps": 0.0}, ValueError, r"eps: expected a positive finite number, got 0.0"),
    "no such backend": ({"backend": "gpu"}, ValueError, r"backend: expected one of 'auto', .*got 'gpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    offset_head(**good())
    with pytest.raises(error, match=message):
        offset_head(**{**good(), **change})


def test_an_offset_network_whose_layers_do_not_fit_is_told_so() -> None:
    """The network calls the operation without its public function, and must not skip its checks."""
    network = OffsetNetwork(8)
    network.depthwise = torch.nn.Conv2d(8, 8, 5, padding=2)  # a full convolution: 8 times the weights
    with pytest.raises(ValueError, match=r"depthwise_weight: expected shape \(8, 1, k, k\)"):
        network(torch.zeros(1, 8, 4, 4), "cpu")
