"""The Triton kernels against the reference in float64: compiled on a GPU, else in Triton's interpreter.

The interpreter runs each operation of each program in Python, so cases are small and most of them let one
program of the gather handle more targets than on a GPU; `test_block_sizes_of_the_gpu` does not.
"""

import pytest
import torch
from sample_inputs import (
    CASES,
    NAMES,
    Case,
    by_name,
    make_grad_output,
    make_inputs,
    output_and_gradients,
    output_batch,
    truth,
)
from stable_sam_cuda.kernels.sample import gather
from tolerances import BACKWARD, FORWARD, SUMMED_AFTER_ROUNDING, Tolerance, assert_matches
from torch import Tensor

import stable_sam_cuda
from stable_sam_cuda import Backend, backends
from stable_sam_cuda.ops import libraries, reference

DEVICE = "cpu" if libraries.triton_interprets() else "cuda"
OPERATIONS = torch.ops.stable_sam_cuda
TOO_SLOW_TO_INTERPRET = {"64_prompts", "sam_channels", "wide"}
SMALL_CASES = [
    *(case for case in CASES if case.name not in TOO_SLOW_TO_INTERPRET),
    Case("7_prompts", batch=7, channels=4, height=3, width=3, broadcast=frozenset({"features", "identity"})),
    Case("256_channels", batch=1, channels=256, height=3, width=4),
    Case("300_channels", batch=1, channels=300, height=2, width=3, amplitude="channel"),
    Case("wider_than_a_tile", batch=1, channels=16, height=3, width=37),
]
HALF_CASES = {"routed", "pixel_amplitude", "channel_amplitude", "strided", "33_channels", "one_features"}


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if libraries.triton_interprets():
        monkeypatch.setattr(gather, "TARGETS_TILE", (4, 8))


def tolerance(table: dict[torch.dtype, Tolerance], dtype: torch.dtype) -> Tolerance:
    """The interpreter cuts bfloat16 off where the GPU rounds: a whole unit in the last place, not half."""
    relative, absolute = table[dtype]
    return Tolerance(2 * relative if dtype == torch.bfloat16 and libraries.triton_interprets() else relative, absolute)


def check(case: Case, dtype: torch.dtype) -> None:
    inputs, grad_output = make_inputs(case, dtype, DEVICE), make_grad_output(case, dtype, DEVICE)
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    output, gradients = output_and_gradients(OPERATIONS.deformable_sample_triton, inputs, case.max_offset, grad_output)
    assert output.dtype == dtype
    assert_matches("output", output, expected, tolerance(FORWARD, dtype))
    for name, gradient in gradients.items():
        summed_later = name not in ("features", "identity") and inputs[name].shape[0] != output_batch(case)
        table = SUMMED_AFTER_ROUNDING if summed_later else BACKWARD
        assert gradient.dtype == dtype
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], tolerance(table, dtype))


def test_the_kernels_can_be_used_here() -> None:
    assert backends.why_unavailable(Backend.TRITON) is None


@pytest.mark.usefixtures("poisoned_memory", "large_tiles")
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_output_and_gradients_match_the_reference(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.usefixtures("poisoned_memory", "large_tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in SMALL_CASES if case.name in HALF_CASES], ids=str)
def test_half_types_match_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("max_offset", [1.0, 3.3])
def test_block_sizes_of_the_gpu(max_offset: float) -> None:
    check(Case("gpu", batch=1, channels=20, height=4, width=5, max_offset=max_offset, amplitude="pixel"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", by_name(*TOO_SLOW_TO_INTERPRET), ids=str)
def test_cases_too_slow_to_interpret(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("max_offset", [30.0, 1e6])
def test_offsets_beyond_the_map(max_offset: float) -> None:
    """The window of the gather is cut at the map, not at the largest offset."""
    check(Case("beyond", batch=1, channels=4, height=5, width=9, max_offset=max_offset), torch.float32)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", by_name("routed", "contiguous", "strided", "one_channel"), ids=str)
def test_results_have_the_promised_memory_format(case: Case) -> None:
    inputs, grad_output = make_inputs(case, torch.float32, DEVICE), make_grad_output(case, torch.float32, DEVICE)
    output = OPERATIONS.deformable_sample_triton(*inputs.values(), case.max_offset)
    gradients = OPERATIONS.deformable_sample_triton_backward(grad_output, *inputs.values(), case.max_offset, 31, False)
    for name, tensor in {"output": output, "features": gradients[0], "identity": gradients[2]}.items():
        assert tensor.permute(0, 2, 3, 1).is_contiguous(), name
    assert gradients[1].is_contiguous()


@pytest.mark.usefixtures("poisoned_memory", "large_tiles")
@pytest.mark.parametrize("amplitude", ["pixel", "channel"])
@pytest.mark.parametrize(
    "grad_mask",
    [0, 1, 2, 4, 8, 16, 10, 22, 28],
    ids=lambda mask: "+".join(n for b, n in enumerate(NAMES) if mask >> b & 1),
)
def test_only_gradients_asked_for_are_computed(grad_mask: int, amplitude: str) -> None:
    case = Case("asked", channels=12, height=3, width=4, amplitude=amplitude)
    inputs, grad_output = make_inputs(case, torch.float32, DEVICE), make_grad_output(case, torch.float32, DEVICE)
    _, expected = truth(inputs, case.max_offset, grad_output)
    gradients = OPERATIONS.deformable_sample_triton_backward(
        grad_output, *inputs.values(), case.max_offset, grad_mask, False
    )
    for bit, (name, gradient) in enumerate(zip(NAMES, gradients, strict=True)):
        if grad_mask >> bit & 1:
            assert_matches(f"grad_{name}", gradient, expected[name], BACKWARD[torch.float32])
        else:
            assert gradient.shape == (0,), name


def test_identity_without_alpha_has_no_effect_and_no_gradient() -> None:
    case = Case("unrouted", channels=4, height=3, width=3)
    inputs, grad_output = make_inputs(case, torch.float32, DEVICE), make_grad_output(case, torch.float32, DEVICE)
    inputs["alpha"] = None
    expected = reference.deformable_sample(*inputs.values(), case.max_offset)
    output = OPERATIONS.deformable_sample_triton(*inputs.values(), case.max_offset)
    assert_matches("output", output, expected, FORWARD[torch.float32])
    gradients = OPERATIONS.deformable_sample_triton_backward(grad_output, *inputs.values(), case.max_offset, 4, False)
    assert gradients[2].shape == inputs["identity"].shape
    assert bool((gradients[2] == 0).all())


def test_the_location_is_accurate_to_float32() -> None:
    """Sampling a ramp returns the location itself, here over tanh's whole range and the seam of its two forms."""
    magnitudes = torch.tensor([0, 1e-30, 1e-7, 1e-3, 0.1, 0.2499999, 0.25, 0.2500001, 0.5, 1, 2, 5, 9, 20, 100, 1e38])
    offsets = torch.zeros(1, 2, 1, 32)
    offsets[0, 0, 0] = torch.cat((magnitudes, -magnitudes))
    columns = torch.arange(32, dtype=torch.float64)
    ramp = columns.view(1, 1, 1, 32).float()
    output = OPERATIONS.deformable_sample_triton(ramp.to(DEVICE), offsets.to(DEVICE), None, None, None, 7.5)
    location = (columns + 7.5 * torch.tanh(offsets[0, 0, 0].double())).clamp(0, 31)
    assert (output.cpu().flatten().double() - location).abs().max() < 6e-6  # three units in the last place of 31


def test_zero_offsets_return_the_features_bit_for_bit() -> None:
    features, offsets = torch.randn(2, 20, 5, 6, device=DEVICE), torch.zeros(2, 2, 5, 6, device=DEVICE)
    output = OPERATIONS.deformable_sample_triton(features, offsets, None, None, None, 4.0)
    assert torch.equal(output, features)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("max_offset", [0.0, 2.5])
def test_nan_offsets_poison_their_pixels_and_taps_alone(max_offset: float) -> None:
    case = Case("nan", batch=1, channels=5, height=6, width=7, max_offset=max_offset)
    inputs, grad_output = make_inputs(case, torch.float32, DEVICE), make_grad_output(case, torch.float32, DEVICE)
    for axis, row, column in ((0, 1, 2), (1, 3, 4), (0, 5, 6), (1, 5, 6)):
        inputs["offsets"][0, axis, row, column] = torch.nan
    output, gradients = output_and_gradients(OPERATIONS.deformable_sample_triton, inputs, max_offset, grad_output)
    expected, expected_gradients = truth(inputs, max_offset, grad_output)
    assert 0 < int(expected.isnan().sum()) < expected.numel()
    # As bilinear.h has it, NaN along one axis makes both gradients NaN, even one that the clamp would stop.
    poisoned = inputs["offsets"].isnan().any(1, keepdim=True)
    expected_gradients["offsets"] = expected_gradients["offsets"].masked_fill(poisoned, torch.nan)
    for name, actual, wanted in (
        ("output", output, expected),
        ("grad_features", gradients["features"], expected_gradients["features"]),
        ("grad_identity", gradients["identity"], expected_gradients["identity"]),
        ("grad_offsets", gradients["offsets"], expected_gradients["offsets"]),
    ):
        assert torch.equal(actual.isnan(), wanted.isnan()), name
        assert_matches(name, actual.nan_to_num(0.0), wanted.nan_to_num(0.0), BACKWARD[torch.float32])


@pytest.mark.usefixtures("large_tiles")
def test_infinite_offsets_saturate_and_read_nothing_outside() -> None:
    """The features lie inside a NaN-filled buffer, so a read outside them would show."""
    batch, channels, height, width = 1, 6, 4, 5
    buffer = torch.full((3 * batch * height * width * channels,), torch.nan, device=DEVICE)
    start = batch * height * width * channels + 1  # nor is the start aligned to more than an element
    features = buffer[start : 2 * start - 1].view(batch, height, width, channels).permute(0, 3, 1, 2)
    features.copy_(torch.randn(features.shape))
    offsets = torch.full((batch, 2, height, width), torch.inf, device=DEVICE)
    offsets[:, :, ::2] = -torch.inf
    offsets[:, 0, :, ::2] *= -1
    inputs = {**dict.fromkeys(NAMES), "features": features, "offsets": offsets}
    grad_output = torch.randn(batch, channels, height, width, device=DEVICE)
    expected, expected_gradients = truth(inputs, 1.3, grad_output)
    output, gradients = output_and_gradients(OPERATIONS.deformable_sample_triton, inputs, 1.3, grad_output)
    assert_matches("output", output, expected, FORWARD[torch.float32])
    for name in ("features", "offsets"):
        assert_matches(name, gradients[name], expected_gradients[name], BACKWARD[torch.float32])


def test_offsets_are_addressed_with_64_bits() -> None:
    """The second prompt's offsets begin over 2**31 elements after the first's; memory between is never touched."""
    stride = 2**31 + 24
    offsets = torch.empty(stride + 24, dtype=torch.float16, device=DEVICE).as_strided((2, 2, 3, 4), (stride, 12, 4, 1))
    offsets.copy_(torch.randn(offsets.shape))
    features = torch.randn(1, 3, 3, 4, device=DEVICE).half()
    expected = reference.deformable_sample(features.double(), offsets.double(), None, None, None, 1.5)
    output = OPERATIONS.deformable_sample_triton(features, offsets, None, None, None, 1.5)
    assert_matches("output", output, expected, FORWARD[torch.float16])


def test_float64_is_refused() -> None:
    features, offsets = torch.zeros(1, 2, 3, 3, device=DEVICE).double(), torch.zeros(1, 2, 3, 3, device=DEVICE).double()
    with pytest.raises(TypeError, match=r"features must be float32, float16 or bfloat16 .* got torch.float64"):
        OPERATIONS.deformable_sample_triton(features, offsets, None, None, None, 1.0)


@pytest.mark.usefixtures("large_tiles")
def test_opcheck() -> None:
    case = Case("opcheck", batch=2, channels=4, height=2, width=3, amplitude="pixel", broadcast=frozenset({"identity"}))
    inputs, grad_output = make_inputs(case, torch.float32, DEVICE), make_grad_output(case, torch.float32, DEVICE)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.library.opcheck(OPERATIONS.deformable_sample_triton.default, (*leaves, 1.0))
    backward_arguments = (grad_output, *(leaf.detach() for leaf in leaves), 1.0, 31, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATIONS.deformable_sample_triton_backward.default, backward_arguments, test_utils=tests)


@pytest.mark.usefixtures("large_tiles")
def test_compiles_as_one_graph() -> None:
    case = Case("compiled", batch=2, channels=4, height=3, width=3)
    inputs, grad_output = make_inputs(case, torch.float32, DEVICE), make_grad_output(case, torch.float32, DEVICE)

    def function(
        features: Tensor, offsets: Tensor, identity: Tensor, alpha: Tensor, _: None, max_offset: float
    ) -> Tensor:
        sampled = stable_sam_cuda.deformable_sample(
            2 * features, offsets, identity=identity, alpha=alpha, max_offset=max_offset, backend="triton"
        )
        return sampled + 1

    eager = output_and_gradients(function, inputs, case.max_offset, grad_output)
    compiled_function = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled = output_and_gradients(compiled_function, inputs, case.max_offset, grad_output)
    assert torch.equal(eager[0], compiled[0])
    for name, gradient in eager[1].items():
        assert torch.equal(gradient, compiled[1][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current() -> None:
    case = Case("cuda:1", channels=16)
    inputs, grad_output = make_inputs(case, torch.float32, "cuda:1"), make_grad_output(case, torch.float32, "cuda:1")
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    output, gradients = output_and_gradients(OPERATIONS.deformable_sample_triton, inputs, case.max_offset, grad_output)
    assert_matches("output", output, expected, FORWARD[torch.float32])
    for name, gradient in gradients.items():
        assert_matches(name, gradient, expected_gradients[name], BACKWARD[torch.float32])
