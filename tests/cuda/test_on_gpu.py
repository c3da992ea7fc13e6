"""Both GPU backends against the reference in float64, and what only a device can show."""

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
from tolerances import BACKWARD, FORWARD, SUMMED_AFTER_ROUNDING, assert_matches
from torch import Tensor

import stable_sam_cuda
from stable_sam_cuda import Backend, backends

pytestmark = pytest.mark.gpu

BACKENDS = [Backend.CUDA, Backend.TRITON]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MIXED = by_name(
    "routed", "pixel_amplitude", "channel_amplitude", "3_channels", "sam_channels", "strided", "one_features"
)
EVERY = 31


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.value)
def suffix(request: pytest.FixtureRequest) -> str:
    """What the names of the backend's operators end with."""
    assert backends.why_unavailable(request.param) is None
    return "_triton" if request.param is Backend.TRITON else ""


def forward(suffix: str, inputs: dict[str, Tensor | None], max_offset: float) -> Tensor:
    return getattr(torch.ops.stable_sam_cuda, f"deformable_sample{suffix}")(*inputs.values(), max_offset)


def backward(
    suffix: str, grad_output: Tensor, inputs: dict[str, Tensor | None], max_offset: float, grad_mask: int = EVERY
) -> tuple[Tensor, ...]:
    operation = getattr(torch.ops.stable_sam_cuda, f"deformable_sample{suffix}_backward")
    return operation(grad_output, *inputs.values(), max_offset, grad_mask, True)


def on_device(inputs: dict[str, Tensor | None], device: str = "cuda") -> dict[str, Tensor | None]:
    """Copies with the same strides."""
    copies: dict[str, Tensor | None] = dict.fromkeys(inputs)
    for name, tensor in inputs.items():
        if tensor is not None:
            copies[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            copies[name].copy_(tensor)
    return copies


def sam_sized(batch: int, dtype: torch.dtype) -> tuple[dict[str, Tensor | None], Tensor]:
    """SAM's own sizes, made on the device."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    inputs = dict.fromkeys(NAMES)
    inputs |= {"features": normal(batch, 256, 64, 64), "offsets": normal(batch, 2, 64, 64)}
    inputs |= {"identity": normal(batch, 256, 64, 64), "alpha": normal(batch, 2)}
    return inputs, normal(batch, 256, 64, 64)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_backend_is_there(backend: Backend) -> None:
    assert backends.why_unavailable(backend) is None


def test_auto_takes_the_compiled_kernels() -> None:
    assert backends.choose("auto", torch.device("cuda"), torch.bfloat16) is Backend.CUDA


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for dtype in DTYPES for case in (CASES if dtype == torch.float32 else MIXED)],
    ids=str,
)
def test_output_and_gradients_match_the_reference(suffix: str, case: Case, dtype: torch.dtype) -> None:
    inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    operation = getattr(torch.ops.stable_sam_cuda, f"deformable_sample{suffix}")
    output, gradients = output_and_gradients(operation, on_device(inputs), case.max_offset, grad_output.cuda())
    assert_matches("output", output, expected, FORWARD[dtype])
    for name, gradient in gradients.items():
        summed_later = name not in ("features", "identity") and inputs[name].shape[0] != output_batch(case)
        table = SUMMED_AFTER_ROUNDING if summed_later else BACKWARD
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], table[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_offset", [1.5, 4.0, 80.0])
def test_the_size_of_sam(suffix: str, dtype: torch.dtype, max_offset: float) -> None:
    inputs, grad_output = sam_sized(3, dtype)
    # The reference rounds as float32 does where an integer location may fall on either side.
    near = (max_offset * torch.tanh(inputs["offsets"].double())).frac().abs()
    inputs["offsets"][(near < 1e-3) | (near > 1 - 1e-3)] += 0.05
    expected, expected_gradients = truth(inputs, max_offset, grad_output)
    # Coordinates are off by s * 2**-23 where the range s, not the width of 64, decides their error.
    wider = max(1.0, 2 * max_offset / 64)
    limits, gradient_limits = (table[dtype]._replace(absolute=wider * 5e-5) for table in (FORWARD, BACKWARD))
    assert_matches("output", forward(suffix, inputs, max_offset), expected, limits)
    gradients = dict(zip(NAMES, backward(suffix, grad_output, inputs, max_offset, 15), strict=True))
    for name, true in expected_gradients.items():
        if name != "offsets":  # at this number of locations a few lie within rounding of an integer
            assert_matches(f"grad_{name}", gradients[name], true, gradient_limits)
    close = torch.isclose(gradients["offsets"].double(), expected_gradients["offsets"], rtol=0.02, atol=0.5)
    assert close.double().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_off_16_byte_boundaries(suffix: str, dtype: torch.dtype) -> None:
    case = Case("unaligned", channels=16)
    inputs = make_inputs(case, dtype)
    expected = forward(suffix, on_device(inputs), case.max_offset)
    shifted = on_device(inputs)
    memory = torch.empty(inputs["features"].numel() + 1, dtype=dtype, device="cuda")
    shifted["features"] = torch.as_strided(memory, inputs["features"].shape, inputs["features"].stride(), 1)
    shifted["features"].copy_(inputs["features"])
    assert shifted["features"].data_ptr() % 16 != 0
    assert torch.equal(forward(suffix, shifted, case.max_offset), expected)


@pytest.mark.parametrize("max_offset", [0.0, 1.5])
def test_nan_and_infinite_offsets(suffix: str, max_offset: float) -> None:
    case = Case("wild", channels=8, height=6, width=7, max_offset=max_offset, amplitude="pixel")
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    inputs["offsets"][0, 0, 2, 3] = torch.nan
    inputs["offsets"][1, 1, 5, 6] = torch.nan
    inputs["offsets"][:, :, 0, 0] = torch.inf
    inputs["offsets"][:, :, 4, 4] = -torch.inf
    expected, expected_gradients = truth(inputs, max_offset, grad_output)
    inputs = on_device(inputs)
    gradients = dict(zip(NAMES, backward(suffix, grad_output.cuda(), inputs, max_offset), strict=True))
    results = {"output": (forward(suffix, inputs, max_offset), expected, FORWARD)}
    results |= {f"grad_{name}": (gradients[name], expected_gradients[name], BACKWARD) for name in NAMES}
    for name, (result, true, table) in results.items():
        assert torch.equal(result.isnan().cpu(), true.isnan()), name
        assert_matches(name, result.nan_to_num(), true.nan_to_num(), table[torch.float32])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("bit", range(5), ids=NAMES)
def test_one_gradient_alone(suffix: str, bit: int) -> None:
    case = Case("alone", channels=12, amplitude="channel")
    inputs, grad_output = on_device(make_inputs(case, torch.float32)), make_grad_output(case, torch.float32).cuda()
    everything = backward(suffix, grad_output, inputs, case.max_offset)
    alone = backward(suffix, grad_output, inputs, case.max_offset, 1 << bit)
    for i, gradient in enumerate(alone):
        assert gradient.shape == (everything[i].shape if i == bit else (0,))
    assert torch.equal(alone[bit], everything[bit])


@pytest.mark.parametrize("shared_image", [False, True], ids=["image_each", "one_image"])
def test_every_bit_is_the_same_in_every_run(suffix: str, shared_image: bool) -> None:
    inputs, grad_output = sam_sized(16, torch.bfloat16)
    if shared_image:
        inputs["features"], inputs["identity"] = inputs["features"][:1], inputs["identity"][:1]
    first = (forward(suffix, inputs, 2.0), *backward(suffix, grad_output, inputs, 2.0))
    for _ in range(5):
        again = (forward(suffix, inputs, 2.0), *backward(suffix, grad_output, inputs, 2.0))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_work_goes_to_the_current_stream(suffix: str) -> None:
    inputs, grad_output = sam_sized(4, torch.float32)
    expected = (forward(suffix, inputs, 2.0), *backward(suffix, grad_output, inputs, 2.0))
    late = {name: None if tensor is None else torch.full_like(tensor, torch.nan) for name, tensor in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would overtake the copies
        for name, tensor in inputs.items():
            if tensor is not None:
                late[name].copy_(tensor)
        results = (forward(suffix, late, 2.0), *backward(suffix, grad_output, late, 2.0))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_cuda_graphs_capture_and_replay(suffix: str) -> None:
    inputs, grad_output = sam_sized(4, torch.bfloat16)
    forward(suffix, inputs, 2.0), backward(suffix, grad_output, inputs, 2.0)  # compiles, where it has to
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = (forward(suffix, inputs, 2.0), *backward(suffix, grad_output, inputs, 2.0))
    for name in ("features", "offsets", "identity", "alpha"):
        inputs[name].copy_(torch.randn_like(inputs[name]))
    graph.replay()
    expected = (forward(suffix, inputs, 2.0), *backward(suffix, grad_output, inputs, 2.0))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(suffix: str) -> None:
    case = Case("second", channels=16)
    inputs, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    expected = (
        forward(suffix, on_device(inputs), case.max_offset),
        *backward(suffix, grad_output.cuda(), on_device(inputs), case.max_offset),
    )
    there = on_device(inputs, "cuda:1")
    assert torch.cuda.current_device() == 0
    results = (
        forward(suffix, there, case.max_offset),
        *backward(suffix, grad_output.to("cuda:1"), there, case.max_offset),
    )
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))


def test_outputs_of_more_than_2_to_the_31_elements(suffix: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    inputs, _ = sam_sized(1, torch.bfloat16)
    batch = 2100  # x 256 x 64 x 64 = 2.2e9
    last = inputs["offsets"]
    inputs["offsets"] = torch.zeros((batch, 2, 64, 64), dtype=torch.bfloat16, device="cuda")
    inputs["offsets"][-1] = last[0]
    output = forward(suffix, inputs, 2.0)
    alone = forward(suffix, inputs | {"offsets": last}, 2.0)
    assert torch.equal(output[-1], alone[0])
    del output, alone
    gradients = backward(suffix, torch.ones((batch, 256, 64, 64), dtype=torch.bfloat16, device="cuda"), inputs, 2.0, 2)
    assert gradients[1][-1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_compile(backend: Backend, dtype: torch.dtype) -> None:
    inputs, _ = sam_sized(2, torch.float32)

    def sample(features: Tensor, offsets: Tensor, identity: Tensor, alpha: Tensor) -> Tensor:
        return stable_sam_cuda.deformable_sample(
            features, offsets, identity=identity, alpha=alpha, max_offset=2.0, backend=backend
        )

    leaves = [inputs[name].requires_grad_() for name in NAMES[:4]]
    with torch.autocast("cuda", dtype=dtype):
        plain = sample(*leaves)
        compiled = torch.compile(sample, fullgraph=True)(*leaves)
    assert plain.dtype == compiled.dtype == dtype
    assert torch.equal(plain, compiled)
    gradients = [torch.autograd.grad(output.float().square().sum(), leaves) for output in (plain, compiled)]
    for name, eager, traced in zip(NAMES, *gradients, strict=False):
        assert torch.equal(eager, traced), name


@pytest.mark.parametrize("case", by_name("routed", "channel_amplitude", "one_features"), ids=str)
def test_opcheck(suffix: str, case: Case) -> None:
    inputs = on_device(make_inputs(case, torch.float32))
    leaves = [tensor if tensor is None else tensor.requires_grad_() for tensor in inputs.values()]
    operation = getattr(torch.ops.stable_sam_cuda, f"deformable_sample{suffix}")
    torch.library.opcheck(operation.default, (*leaves, case.max_offset))
