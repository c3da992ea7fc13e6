"""The CUDA operators' entry points on the host: what they tell PyTorch and CUDA, whatever the tensors look like.

The kernels below them run as in test_kernels_on_host.py, on tensors of the CPU.
"""

import ctypes
import shutil
from collections.abc import Iterator

import pytest
import torch
from host_kernels import HostOperators
from sample_inputs import NAMES, Case, make_grad_output, make_inputs, output_batch, truth
from tolerances import BACKWARD, FORWARD, assert_matches
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

REFUSED, ILLEGAL_ADDRESS, NO_IMAGE = 1, 700, 209
ALL_GRADIENTS = 31


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> HostOperators:
    return HostOperators(tmp_path_factory.mktemp("host_operators"))


@pytest.fixture
def host(built: HostOperators) -> Iterator[HostOperators]:
    built.shim.shim_reset()
    yield built
    built.shim.shim_reset()


def forward(host: HostOperators, inputs: dict[str, Tensor | None], max_offset: float) -> Tensor:
    return host.operators.deformable_sample(*inputs.values(), max_offset)


def backward(
    host: HostOperators, inputs: dict[str, Tensor | None], max_offset: float, grad_output: Tensor
) -> tuple[Tensor, ...]:
    return host.operators.deformable_sample_backward(grad_output, *inputs.values(), max_offset, ALL_GRADIENTS, False)


def plain(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """NCHW, so that every map has to be copied."""
    return {name: None if t is None else t.contiguous() for name, t in inputs.items()}


CASE = Case("entry point", channels=16, amplitude="channel")


@pytest.mark.parametrize("operator", ["forward", "backward"])
def test_the_device_is_set_before_anything_is_copied_or_allocated(host: HostOperators, operator: str) -> None:
    inputs, grad_output = plain(make_inputs(CASE, torch.float32)), make_grad_output(CASE, torch.float32).contiguous()
    if operator == "forward":
        forward(host, inputs, CASE.max_offset)
    else:
        backward(host, inputs, CASE.max_offset, grad_output)
    assert host.shim.shim_guarded_calls() >= 4, "three maps are copied, one result is made"
    assert host.shim.shim_unguarded_calls() == 0
    assert host.shim.shim_guards() == 0, "the device is set back"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (REFUSED, "the CUDA launch failed: the launch was refused"),
        (NO_IMAGE, "the CUDA launch failed: the launch was refused"),
        (ILLEGAL_ADDRESS, "an earlier CUDA kernel failed .*: an illegal memory access"),
    ],
)
def test_a_refused_launch_is_told_once(host: HostOperators, error: int, message: str) -> None:
    inputs, grad_output = make_inputs(CASE, torch.float32), make_grad_output(CASE, torch.float32)
    host.shim.shim_refuse_launches(error)
    with pytest.raises(RuntimeError, match=f"deformable_sample: {message}"):
        forward(host, inputs, CASE.max_offset)
    assert host.shim.shim_last_error() == 0, "PyTorch's next launch would find it"
    with pytest.raises(RuntimeError, match=f"deformable_sample_backward: {message}"):
        backward(host, inputs, CASE.max_offset, grad_output)
    assert host.shim.shim_last_error() == 0
    assert host.shim.shim_guards() == 0
    host.shim.shim_refuse_launches(0)
    forward(host, inputs, CASE.max_offset)


def test_an_error_that_others_left_is_neither_blamed_nor_taken(host: HostOperators) -> None:
    host.shim.shim_leave_error(REFUSED)
    forward(host, make_inputs(CASE, torch.float32), CASE.max_offset)
    assert host.shim.shim_last_error() == REFUSED


@pytest.mark.parametrize(
    ("broadcast", "evicted"),
    [((), ("identity", "amplitude")), (("identity",), ("amplitude",)), (("amplitude",), ("identity",))],
    ids=["none", "identity", "amplitude"],
)
def test_what_all_prompts_read_stays_in_the_caches(
    host: HostOperators, broadcast: tuple[str, ...], evicted: tuple[str, ...]
) -> None:
    """Loads that go first when the caches are full: one each pack of channels of a map that a prompt alone reads."""
    case = Case("shared", batch=2, channels=16, amplitude="channel", broadcast=frozenset(broadcast))
    inputs, grad_output = make_inputs(case, torch.float16), make_grad_output(case, torch.float16)
    host.shim.shim_evict_first_loads.restype = ctypes.c_long
    packs = case.batch * case.height * case.width * case.channels // 8
    forward(host, inputs, case.max_offset)
    assert host.shim.shim_evict_first_loads() == packs * len(evicted)
    backward(host, inputs, case.max_offset, grad_output)
    assert host.shim.shim_evict_first_loads() == packs * (len(evicted) + ("identity" in evicted))


def viewed(tensor: Tensor, layout: str) -> Tensor:
    """The same values, laid out in memory as a caller's slice or expansion leaves them."""
    if layout == "off 16 bytes":
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        view = memory[1:].as_strided(tensor.shape, tensor.stride())
    elif layout == "every other prompt":
        view = torch.empty((2 * tensor.shape[0], *tensor.shape[1:]), dtype=tensor.dtype)[::2]
    elif layout == "a window of a map":
        view = torch.empty([size + 1 for size in tensor.shape], dtype=tensor.dtype)
        view = view[tuple(slice(1, None) for _ in tensor.shape)]
    else:
        raise AssertionError(layout)
    return view.copy_(tensor)


SHAPES = [
    Case("one prompt", batch=1, channels=16, amplitude="channel"),
    Case("odd channels", batch=1, channels=13, amplitude="channel"),
    Case("one row", batch=2, channels=8, height=1, width=9, amplitude="pixel"),
    Case("one column", batch=2, channels=8, height=9, width=1, amplitude="pixel"),
    Case("one pixel", batch=3, channels=8, height=1, width=1, amplitude="pixel"),
    Case("one channel", batch=2, channels=1, amplitude="channel"),
]


@pytest.mark.parametrize("layout", ["as they come", "off 16 bytes", "every other prompt", "a window of a map"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes_and_layouts(host: HostOperators, case: Case, layout: str) -> None:
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    if layout != "as they come":
        inputs = {name: None if t is None else viewed(t, layout) for name, t in inputs.items()}
        grad_output = viewed(grad_output, layout)
    output = forward(host, inputs, case.max_offset)
    assert_matches("output", output, expected, FORWARD[torch.float32])
    for name, gradient in zip(NAMES, backward(host, inputs, case.max_offset, grad_output), strict=True):
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], BACKWARD[torch.float32])


@pytest.mark.parametrize("size", [{"batch": 0}, {"height": 0}, {"width": 0}, {"channels": 0}], ids=str)
def test_nothing_to_do(host: HostOperators, size: dict[str, int]) -> None:
    case = Case("empty", amplitude="pixel", broadcast=frozenset({"features"}), **size)
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    output = forward(host, inputs, case.max_offset)
    assert output.shape == (output_batch(case), case.channels, case.height, case.width)
    for gradient in backward(host, inputs, case.max_offset, grad_output):
        assert gradient.numel() == 0 or torch.equal(gradient, torch.zeros_like(gradient))
