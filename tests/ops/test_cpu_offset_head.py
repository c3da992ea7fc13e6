"""The compiled CPU offset_head against the reference in float64: output and every gradient, on poisoned memory."""

import pytest
import torch
from head_cases import HEAD_NAMES, HeadCase, head_truth, make_head_inputs, run_and_differentiate
from tolerances import HEAD_BACKWARD, HEAD_FORWARD, assert_matches
from torch import Tensor

pytestmark = pytest.mark.usefixtures("two_threads")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPERATIONS = torch.ops.stable_sam_cuda
EVERY = 127
CASES = [
    HeadCase("plain"),
    HeadCase("contiguous", layout="contiguous"),
    HeadCase("strided", layout="strided"),
    HeadCase("1x1", height=1, width=1),
    HeadCase("one_row", height=1, width=11),
    HeadCase("one_column", height=11, width=1),
    HeadCase("one_channel", channels=1, eps=0.1),
    HeadCase("17_channels", channels=17),
    HeadCase("several_bands", batch=1, channels=3, height=37, width=8),
    HeadCase("sam_channels", batch=1, channels=256, height=6, width=9),
    HeadCase("more_bands_than_tasks", batch=67, channels=6, height=2, width=2),
    HeadCase("kernel_1", kernel_size=1),
    HeadCase("kernel_3", kernel_size=3, height=18),
    HeadCase("kernel_7", kernel_size=7, height=19),
    HeadCase("kernel_beyond_the_image", kernel_size=11, height=3, width=4),
]


def check(case: HeadCase, dtype: torch.dtype) -> None:
    inputs, grad_output = make_head_inputs(case, dtype, normalised=True)
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    output, gradients = run_and_differentiate(OPERATIONS.offset_head, inputs, case.eps, grad_output)
    assert output.dtype == dtype and output.is_contiguous()
    assert_matches("output", output, expected, HEAD_FORWARD[dtype])
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        if case.channels == 1 and name in ("features", "depthwise_weight", "depthwise_bias", "norm_weight"):
            assert bool((gradient.abs() < 1e-5).all()), name  # one channel is always its own mean
        else:
            assert_matches(f"grad_{name}", gradient, expected_gradients[name], HEAD_BACKWARD[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_reference(case: HeadCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("grad_mask", [0, *(1 << bit for bit in range(7)), EVERY - 1, EVERY])
def test_only_gradients_asked_for_are_computed(grad_mask: int) -> None:
    case = HeadCase("asked", channels=12, height=19)
    inputs, grad_output = make_head_inputs(case, torch.float32, normalised=True)
    _, expected = head_truth(inputs, case.eps, grad_output)
    gradients = OPERATIONS.offset_head_backward(grad_output, *inputs.values(), case.eps, grad_mask)
    for bit, (name, gradient) in enumerate(zip(HEAD_NAMES, gradients, strict=True)):
        if grad_mask >> bit & 1:
            assert_matches(f"grad_{name}", gradient, expected[name], HEAD_BACKWARD[torch.float32])
        else:
            assert gradient.shape == (0,), name


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_gradcheck(kernel_size: int) -> None:
    inputs, _ = make_head_inputs(
        HeadCase("small", batch=2, channels=3, height=3, width=2, kernel_size=kernel_size),
        torch.float64,
        normalised=True,
    )
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *tensors: OPERATIONS.offset_head(*tensors, 1e-2), leaves)


def test_opcheck() -> None:
    case = HeadCase("opcheck", channels=3, height=3, width=4, kernel_size=3)
    inputs, grad_output = make_head_inputs(case, torch.float32, normalised=True)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPERATIONS.offset_head.default, (*leaves, 1e-6), test_utils=tests)
    plain = [leaf.detach() for leaf in leaves]
    for grad_mask in (0, 5, EVERY):
        arguments = (grad_output, *plain, 1e-6, grad_mask)
        torch.library.opcheck(
            OPERATIONS.offset_head_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    case = HeadCase("threads", batch=3, channels=20, height=35, width=11)
    inputs, grad_output = make_head_inputs(case, dtype, normalised=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            output, gradients = run_and_differentiate(OPERATIONS.offset_head, inputs, case.eps, grad_output)
            results.append([output, *gradients.values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(first, again) for first, again in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_is_exact_to_the_last_places(dtype: torch.dtype) -> None:
    """Two channels of mean 0 are normalised to 1 and -1, so the output is gelu(weight + bias) of the first."""
    z = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-20, 0, 501), -torch.logspace(-20, 0, 501)])
    z = z.to(dtype)
    features = torch.tensor([1.0, -1.0], dtype=dtype).view(1, 2, 1, 1)
    bias, zero = torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    one, first = torch.ones(2, 1, 1, 1, dtype=dtype), torch.tensor([[1.0, 0], [0, 0]], dtype=dtype).view(2, 2, 1, 1)
    got, slopes = [], []
    for value in z[::10]:
        norm_bias = (bias + value).requires_grad_()
        output = OPERATIONS.offset_head(features, one, zero, zero, norm_bias, first, zero, 1e-6)[0, 0, 0, 0]
        slopes.append(torch.autograd.grad(output, norm_bias)[0][0])
        got.append(output.detach())
    exact = z[::10].double().requires_grad_()
    truth = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    limit = 4 * torch.finfo(dtype).eps
    assert ((torch.stack(got).double() - truth).abs() <= limit * exact.abs().clamp(min=1e-30)).all()
    assert ((torch.stack(slopes).double() - slope).abs() <= limit * (1 + exact.abs())).all()


def test_a_nan_feature_stays_within_the_kernel() -> None:
    case = HeadCase("nan", batch=2, channels=5, height=9, width=17, kernel_size=3)
    inputs, _ = make_head_inputs(case, torch.float32, normalised=True)
    clean = OPERATIONS.offset_head(*inputs.values(), case.eps)
    inputs["features"][0, 3, 4, 15] = torch.nan
    output = OPERATIONS.offset_head(*inputs.values(), case.eps)
    poisoned = torch.zeros_like(output, dtype=torch.bool)
    poisoned[0, :, 3:6, 14:17] = True
    assert output[poisoned].isnan().all()
    assert torch.equal(output[~poisoned], clean[~poisoned])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"height": 0}, {"width": 0}], ids=lambda sizes: f"no_{next(iter(sizes))}"
)
def test_no_pixels_at_all(sizes: dict[str, int]) -> None:
    case = HeadCase("empty", **sizes)
    inputs, grad_output = make_head_inputs(case, torch.float32, normalised=True)
    output = OPERATIONS.offset_head(*inputs.values(), case.eps)
    assert output.shape == (case.batch, 2, case.height, case.width)
    gradients = OPERATIONS.offset_head_backward(grad_output, *inputs.values(), case.eps, EVERY)
    for name, gradient in zip(HEAD_NAMES, gradients, strict=True):
        assert gradient.shape == inputs[name].shape and bool((gradient == 0).all()), name


RAW_CALLS: dict[str, tuple[dict[str, Tensor], str]] = {
    "features of 3 axes": ({"features": torch.zeros(4, 5, 6)}, "features: expected 4 dimensions, got 3"),
    "features are integers": ({"features": torch.zeros(2, 4, 5, 6, dtype=torch.int64)}, "features: expected dtype"),
    "an even kernel": (
        {"depthwise_weight": torch.zeros(8, 1, 4, 4)},
        "depthwise_weight: expected an odd kernel size, got 4",
    ),
    "an oblong kernel": (
        {"depthwise_weight": torch.zeros(8, 1, 3, 5)},
        "depthwise_weight: expected size 5 along axis 2, got 3",
    ),
    "weights of other channels": (
        {"depthwise_weight": torch.zeros(7, 1, 5, 5)},
        "depthwise_weight: expected size 8 along axis 0, got 7",
    ),
    "a short bias": ({"norm_bias": torch.zeros(3)}, "norm_bias: expected size 8 along axis 0, got 3"),
    "one output": (
        {"pointwise_weight": torch.zeros(1, 8, 1, 1)},
        "pointwise_weight: expected size 2 along axis 0, got 1",
    ),
    "another dtype": ({"norm_weight": torch.zeros(8).double()}, "norm_weight: expected the dtype of features"),
}


@pytest.mark.parametrize(("change", "message"), RAW_CALLS.values(), ids=RAW_CALLS.keys())
def test_the_raw_operators_refuse_what_would_leave_a_tensor(change: dict[str, Tensor], message: str) -> None:
    inputs, grad_output = make_head_inputs(HeadCase("good"), torch.float32, normalised=True)
    arguments = {**inputs, **change}
    with pytest.raises(RuntimeError, match=message):
        OPERATIONS.offset_head(*arguments.values(), 1e-6)
    with pytest.raises(RuntimeError, match=message):
        OPERATIONS.offset_head_backward(grad_output, *arguments.values(), 1e-6, EVERY)


@pytest.mark.parametrize("shape", [(2, 2, 5, 6), (1, 2, 5, 7), (2, 1, 5, 7), (2, 2, 5)], ids=str)
def test_the_raw_backward_refuses_a_wrong_gradient(shape: tuple[int, ...]) -> None:
    inputs, _ = make_head_inputs(HeadCase("good"), torch.float32, normalised=True)
    with pytest.raises(RuntimeError, match="grad_output: expected"):
        OPERATIONS.offset_head_backward(torch.zeros(shape), *inputs.values(), 1e-6, EVERY)
