"""Triton's offset_head against the reference in float64: compiled on a GPU, else in Triton's interpreter.

The interpreter runs each operation of each program in Python, so the cases are small.
"""

import pytest
import torch
from head_cases import HEAD_NAMES, HeadCase, assert_head_matches, head_truth, make_head_inputs, run_and_differentiate
from stable_sam_cuda.kernels.offset_head import backward as head_backward
from stable_sam_cuda.kernels.offset_head import plan as head_plan
from torch import Tensor

import stable_sam_cuda
from stable_sam_cuda import kernels
from stable_sam_cuda.ops import libraries

DEVICE = "cpu" if libraries.triton_interprets() else "cuda"
OPERATIONS = torch.ops.stable_sam_cuda
EVERY = 127
CASES = [
    HeadCase("plain"),
    HeadCase("1x1_map", height=1, width=1),
    HeadCase("one_row", height=1, width=9),
    HeadCase("one_column", height=9, width=1),
    HeadCase("kernel_of_1", kernel_size=1),
    HeadCase("kernel_of_3", kernel_size=3),
    HeadCase("kernel_of_7", batch=1, kernel_size=7),
    HeadCase("kernel_beyond_the_map", batch=1, height=3, width=2, kernel_size=9),
    HeadCase("3_channels", channels=3),
    HeadCase("33_channels", batch=1, channels=33, height=4),
    HeadCase("256_channels", batch=1, channels=256, height=2, width=3),
    HeadCase("several_tiles", batch=1, channels=1024, height=3, width=5, kernel_size=3),
    HeadCase("300_channels", batch=1, channels=300, height=2, width=5),
    HeadCase("wide", batch=1, height=2, width=70, kernel_size=3),
    HeadCase("large_eps", eps=0.5),
    HeadCase("contiguous", layout="contiguous"),
    HeadCase("strided", layout="strided"),
]
HALF_CASES = [case for case in CASES if case.name in ("plain", "33_channels", "256_channels", "strided")]


def assert_close(name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32) -> None:
    cut_off = dtype == torch.bfloat16 and libraries.triton_interprets()  # where the GPU rounds
    assert_head_matches(name, actual, truth, dtype, 2.0 if cut_off else 1.0)


def check(case: HeadCase, dtype: torch.dtype = torch.float32) -> None:
    inputs, grad_output = make_head_inputs(case, dtype, DEVICE)
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head_triton, inputs, case.eps, grad_output)
    assert output.dtype == dtype and output.is_contiguous()
    assert_close("output", output, expected, dtype)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(name, gradient, expected_gradients[name], dtype)


def backward(case: HeadCase, grad_mask: int = EVERY) -> tuple[Tensor, ...]:
    inputs, grad_output = make_head_inputs(case, torch.float32, DEVICE)
    return kernels.offset_head_backward(grad_output, *inputs.values(), case.eps, grad_mask)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_reference(case: HeadCase) -> None:
    check(case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_types_match_the_reference(case: HeadCase, dtype: torch.dtype) -> None:
    check(case, dtype)


def test_one_channel() -> None:
    """Normalised it is 0, so all that comes before the norm has a gradient of 0, which rounding is not to disturb."""
    case = HeadCase("one_channel", channels=1, height=2, width=3)
    inputs, grad_output = make_head_inputs(case, torch.float32, DEVICE)
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head_triton, inputs, case.eps, grad_output)
    assert_close("output", output, expected)
    for name, gradient in gradients.items():
        if name in ("norm_bias", "pointwise_weight", "pointwise_bias"):
            assert_close(name, gradient, expected_gradients[name])
        else:
            assert bool((gradient.abs() < 1e-2).all()), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shares", [1, 3])
def test_any_number_of_shares_gives_the_same_result(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps have 4 tiles or more in each kernel: 3 shares of 2 leave less or nothing to the last."""

    def split(programs: int, tiles: int, resident: int, device: object) -> tuple[int, int]:
        assert tiles >= 4
        of_each = -(-tiles // shares)
        return -(-tiles // of_each), of_each

    monkeypatch.setattr(head_backward, "split_evenly", split)
    check(HeadCase("shares", batch=2, channels=16, height=9, width=35, kernel_size=3))


@pytest.mark.usefixtures("poisoned_memory")
def test_prompts_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where their temporary is too large to be held together."""
    monkeypatch.setattr(head_backward, "BYTES_AT_A_TIME", 1)
    check(HeadCase("one_at_a_time", batch=3, height=2, width=3, kernel_size=3))


@pytest.mark.usefixtures("poisoned_memory")
def test_only_gradients_asked_for_are_computed() -> None:
    case = HeadCase("asked", batch=1, height=2, width=3, kernel_size=3)
    everything = backward(case)
    for grad_mask in (0, *(1 << bit for bit in range(7)), 0b1000011):
        for bit, gradient in enumerate(backward(case, grad_mask)):
            if grad_mask >> bit & 1:
                assert torch.equal(gradient, everything[bit]), HEAD_NAMES[bit]
            else:
                assert gradient.shape == (0,), HEAD_NAMES[bit]


def test_every_bit_is_the_same_in_every_run() -> None:
    case = HeadCase("again", batch=1, channels=20)
    assert all(torch.equal(a, b) for a, b in zip(backward(case), backward(case), strict=True))


def test_gradients_share_no_memory() -> None:
    gradients = backward(HeadCase("memory", height=2, width=2))
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(HEAD_NAMES)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    assert all(gradient.is_contiguous() for gradient in gradients[1:])


def test_a_nan_pixel_poisons_its_neighbourhood_alone() -> None:
    case = HeadCase("nan", height=6, width=7, kernel_size=3)
    inputs, grad_output = make_head_inputs(case, torch.float32, DEVICE)
    inputs["features"][0, 3, 2, 3] = torch.nan
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head_triton, inputs, case.eps, grad_output)
    assert output[0, :, 1:4, 2:5].isnan().all() and not output[1].isnan().any()
    assert torch.equal(output.isnan(), expected.isnan())
    assert_close("output", output.nan_to_num(), expected.nan_to_num())
    actual, truth = gradients["features"], expected_gradients["features"]
    assert torch.equal(actual.isnan(), truth.isnan())
    assert_close("features", actual.nan_to_num(), truth.nan_to_num())


def test_nothing_outside_the_map_is_read() -> None:
    """The features lie inside a NaN-filled buffer."""
    case = HeadCase("outside", batch=1, channels=6, height=4, width=5)
    inputs, grad_output = make_head_inputs(case, torch.float32, DEVICE)
    elements = inputs["features"].numel()
    buffer = torch.full((3 * elements,), torch.nan, device=DEVICE)
    inside = buffer[elements + 1 : 2 * elements + 1].view(1, case.height, case.width, case.channels)
    inputs["features"] = inside.permute(0, 3, 1, 2).copy_(inputs["features"])
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head_triton, inputs, case.eps, grad_output)
    assert_close("output", output, expected)
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected_gradients[name])


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_features_of_any_size(size: float) -> None:
    """The norm divides by a standard deviation that is then far above or, with the default eps, far below 1."""
    case = HeadCase("size", height=3, width=4)
    inputs, grad_output = make_head_inputs(case, torch.float32, DEVICE)
    inputs["features"] *= size
    inputs["depthwise_bias"] *= size
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head_triton, inputs, case.eps, grad_output)
    assert_close("output", output, expected)
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected_gradients[name])


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"height": 0}, {"width": 0}], ids=lambda sizes: f"no_{next(iter(sizes))}"
)
def test_nothing_to_do(sizes: dict[str, int]) -> None:
    case = HeadCase("empty", **({"batch": 1, "height": 2, "width": 3} | sizes))
    inputs, grad_output = make_head_inputs(case, torch.float32, DEVICE)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head_triton, inputs, case.eps, grad_output)
    assert output.shape == grad_output.shape
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape and bool((gradient == 0).all()), name


def test_float64_is_refused() -> None:
    inputs, _ = make_head_inputs(HeadCase("double", height=2, width=2), torch.float64, DEVICE)
    with pytest.raises(TypeError, match=r"features must be float32, float16 or bfloat16 .* got torch.float64"):
        OPERATIONS.offset_head_triton(*inputs.values(), 1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"depthwise_weight": torch.zeros(8, 1, 4, 4)}, ValueError, r"depthwise_weight: .*k odd, got \(8, 1, 4, 4\)"),
        ({"pointwise_weight": torch.zeros(3, 8, 1, 1)}, ValueError, r"pointwise_weight: .*got \(3, 8, 1, 1\)"),
        ({"norm_bias": torch.zeros(8, dtype=torch.float16)}, TypeError, r"norm_bias: .*got torch.float16"),
        ({"features": torch.zeros(8, 5, 7)}, ValueError, r"features: expected shape \(B, C, H, W\)"),
        ({"eps": 0.0}, ValueError, r"eps: expected a positive finite number"),
    ],
    ids=["even_kernel", "3_offsets", "other_dtype", "3_axes", "no_eps"],
)
def test_bad_input_is_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    inputs, _ = make_head_inputs(HeadCase("bad"), torch.float32, DEVICE)
    changes = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in changes.items()}
    with pytest.raises(error, match=message):
        stable_sam_cuda.offset_head(**(inputs | changes), backend="triton")


def test_rows_of_taps_fill_the_registers_and_no_more() -> None:
    for size in range(1, 41, 2):
        rows = head_plan.rows_of_taps(size)
        assert 1 <= rows <= size and (rows == 1 or 4 * rows * size <= 112)


def test_opcheck() -> None:
    inputs, grad_output = make_head_inputs(HeadCase("opcheck", height=2, width=2), torch.float32, DEVICE)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OPERATIONS.offset_head_triton.default, (*leaves, 1e-6), test_utils=tests)
    plain = [leaf.detach() for leaf in leaves]
    tests = ("test_schema", "test_faketensor")
    for grad_mask in (EVERY, 0b0000101):
        arguments = (grad_output, *plain, 1e-6, grad_mask)
        torch.library.opcheck(OPERATIONS.offset_head_triton_backward.default, arguments, test_utils=tests)


def test_the_network_of_the_plugin() -> None:
    """Through the public function, with an offset network's own parameters, against its own forward."""
    network = stable_sam_cuda.OffsetNetwork(16).to(DEVICE)
    torch.nn.init.normal_(network.pointwise.weight)
    features = torch.randn(2, 16, 5, 6, device=DEVICE)
    projected, expected = network(features)
    parameters = [p for layer in (network.depthwise, network.norm, network.pointwise) for p in layer.parameters()]
    offsets = stable_sam_cuda.offset_head(projected, *parameters, eps=network.norm.eps, backend="triton")
    assert_close("output", offsets.detach(), expected.detach())
