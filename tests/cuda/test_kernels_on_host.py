"""The CUDA kernels' own bodies, compiled for the host, against the reference in float64.

No GPU is needed: blocks run one after the other, their threads in step (tests/cuda/shim). AddressSanitizer watches
arrays of exactly their size, so a wrong index, tail or mask is an error even where the result happens to be right.
What this cannot show: the device's memory ordering, its tanh, and speed.
"""

import math
import shutil
from pathlib import Path

import pytest
import torch
from host_kernels import ROOT, HostKernels, KernelError, build
from sample_inputs import (
    CASES,
    NAMES,
    Case,
    by_name,
    make_grad_output,
    make_inputs,
    output_batch,
    truth,
)
from tolerances import BACKWARD, FORWARD, assert_matches
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

HALF_TYPES = [torch.float16, torch.bfloat16]
MIXED = by_name("routed", "pixel_amplitude", "channel_amplitude", "3_channels", "sam_channels", "one_features")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return build(tmp_path_factory.mktemp("host_kernels"))


def asked(inputs: dict[str, Tensor | None]) -> int:
    return sum(1 << bit for bit, name in enumerate(NAMES) if inputs[name] is not None)


def per_prompt_truth(
    inputs: dict[str, Tensor | None], case: Case, grad_output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """As the kernels return it: only gradients of features and identity are summed over prompts."""
    batch = output_batch(case)
    expanded = {
        name: t if t is None or name in ("features", "identity") else t.expand(batch, *t.shape[1:])
        for name, t in inputs.items()
    }
    return truth(expanded, case.max_offset, grad_output)


def check_case(kernels: HostKernels, case: Case, dtype: torch.dtype, **options: int) -> None:
    inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
    expected, expected_gradients = per_prompt_truth(inputs, case, grad_output)
    assert_matches("output", kernels.forward(inputs, case.max_offset, **options), expected, FORWARD[dtype])
    gradients = kernels.backward(grad_output, inputs, case.max_offset, asked(inputs), **options)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], BACKWARD[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_the_reference(kernels: HostKernels, case: Case) -> None:
    check_case(kernels, case, torch.float32)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_half_types_match_the_reference(kernels: HostKernels, case: Case, dtype: torch.dtype) -> None:
    check_case(kernels, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
def test_addresses_off_16_byte_boundaries(kernels: HostKernels, dtype: torch.dtype) -> None:
    case = Case("unaligned", channels=16, amplitude="channel")
    check_case(kernels, case, dtype, misalignment=dtype.itemsize)


@pytest.mark.parametrize("channels", [8, 24, 40, 264])
def test_packs_that_do_not_fill_the_lanes(kernels: HostKernels, channels: int) -> None:
    check_case(kernels, Case("packs", channels=channels, height=3, width=11, amplitude="channel"), torch.float16)


def test_offsets_far_beyond_the_map(kernels: HostKernels) -> None:
    check_case(kernels, Case("far", max_offset=1e6, height=6, width=5), torch.float32)


def test_a_halo_too_large_for_shared_memory(kernels: HostKernels) -> None:
    case = Case("halo", channels=12, height=9, width=11, max_offset=2.7, amplitude="pixel")
    check_case(kernels, case, torch.float32, without_halo=1)


@pytest.mark.parametrize("max_offset", [0.0, 1.0, 2.5, 15.0, 20.0, 60.0, 1e30])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64), (500, 400)], ids=str)
def test_a_halo_covers_its_tile_or_is_not_kept(kernels: HostKernels, size: tuple[int, int], max_offset: float) -> None:
    columns, halo_rows, halo_columns = kernels.plan(4, *size, 256, max_offset)
    radius = min(max(1, math.ceil(max_offset)), max(size))
    needed = min(8 + 2 * radius, size[0]), min(columns + 2 * radius, size[1])
    fits = 16 * math.prod(needed) + 64 <= 48 * 1024  # bytes of shared memory
    assert (halo_rows, halo_columns) == (needed if fits else (0, 0))


@pytest.mark.parametrize("amplitude", ["pixel", "channel"])
@pytest.mark.parametrize("bit", range(5), ids=NAMES)
def test_one_gradient_alone(kernels: HostKernels, bit: int, amplitude: str) -> None:
    case = Case("alone", channels=12, amplitude=amplitude)
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    _, expected = truth(inputs, case.max_offset, grad_output)
    gradients = kernels.backward(grad_output, inputs, case.max_offset, 1 << bit)
    assert list(gradients) == [NAMES[bit]]
    assert_matches(NAMES[bit], gradients[NAMES[bit]], expected[NAMES[bit]], BACKWARD[torch.float32])


@pytest.mark.parametrize("case", by_name("pixel_amplitude", "one_features", "sam_channels"), ids=str)
def test_results_do_not_depend_on_the_order_of_the_threads(kernels: HostKernels, case: Case) -> None:
    inputs, grad_output = make_inputs(case, torch.float16), make_grad_output(case, torch.float16)
    first = kernels.backward(grad_output, inputs, case.max_offset, asked(inputs))
    last = kernels.backward(grad_output, inputs, case.max_offset, asked(inputs), backwards=1)
    for name, gradient in first.items():
        assert torch.equal(gradient, last[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("max_offset", [0.0, 1.5])
def test_nan_and_infinite_offsets(kernels: HostKernels, max_offset: float, dtype: torch.dtype) -> None:
    """A NaN offset makes its pixel NaN and reaches its four undisplaced taps; infinity saturates."""
    case = Case("wild", channels=8, height=6, width=7, max_offset=max_offset, amplitude="pixel")
    inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
    offsets = inputs["offsets"]
    assert offsets is not None
    offsets[0, 0, 2, 3] = torch.nan
    offsets[1, 1, 5, 6] = torch.nan
    offsets[:, :, 0, 0] = torch.inf
    offsets[:, :, 4, 4] = -torch.inf
    expected, expected_gradients = truth(inputs, max_offset, grad_output)

    output = kernels.forward(inputs, max_offset)
    assert output[0, :, 2, 3].isnan().all() and output[1, :, 5, 6].isnan().all()
    gradients = kernels.backward(grad_output, inputs, max_offset, asked(inputs))
    results = {"output": (output, expected, FORWARD)}
    results |= {f"grad_{name}": (gradients[name], expected_gradients[name], BACKWARD) for name in NAMES}
    for name, (result, true, table) in results.items():
        assert torch.equal(result.isnan(), true.isnan()), name
        assert_matches(name, result.nan_to_num(), true.nan_to_num(), table[dtype])


PLANTS = {
    # The right tap at the map's last column: one pixel past the row, at the last row past the array.
    "tile.cuh": ("location.x.next != location.x.cell ? channels : 0", "channels"),
    # The window that is known to be too small: (2 ceil(s) - 1)^2.
    "backward_arguments.h": ("2 * radius + 1", "2 * radius - 1"),
}


@pytest.fixture(scope="module")
def faulty_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels with two planted errors."""
    folder = tmp_path_factory.mktemp("faulty_kernels")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name, (right, wrong) in PLANTS.items():
        path: Path = folder / "csrc" / "cuda" / name
        text = path.read_text()
        assert right in text
        path.write_text(text.replace(right, wrong))
    return build(folder, folder / "csrc", ("-DONLY_FLOAT",))


def test_a_planted_tap_past_the_end_is_found(faulty_kernels: HostKernels) -> None:
    case = Case("planted", batch=1, routed=False)
    with pytest.raises(KernelError, match="heap-buffer-overflow"):
        faulty_kernels.forward(make_inputs(case, torch.float32), case.max_offset)


def test_a_planted_small_window_is_found(faulty_kernels: HostKernels) -> None:
    case = Case("planted", height=9, width=9, max_offset=1.5, routed=False)
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    _, expected = truth(inputs, case.max_offset, grad_output)
    gradients = faulty_kernels.backward(grad_output, inputs, case.max_offset, 1)
    with pytest.raises(AssertionError, match="grad_features"):
        assert_matches("grad_features", gradients["features"], expected["features"], BACKWARD[torch.float32])
