"""Which backend is chosen, and what is said where one is missing."""

import itertools
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from stable_sam_cuda import Backend, BackendUnavailableError, MissingBackendWarning, deformable_sample
from stable_sam_cuda import backends as public
from stable_sam_cuda.ops import backends, libraries
from stable_sam_cuda.ops.backends import Choice

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DISPATCHED = (  # a backend, what its op's name has behind it, and where it could have kernels
    (Backend.CPU, "", ("CPU",)),
    (Backend.CUDA, "", ("CUDA",)),
    (Backend.TRITON, "_triton", ("CPU", "CUDA")),
)
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0+PTX")


@pytest.fixture
def everything_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Backend, str | None]]:
    """All backends installed and one H100, whatever this machine has; tests take some away."""
    state = dict.fromkeys(backends.MISSING)
    monkeypatch.setattr(backends, "MISSING", state)
    monkeypatch.setattr(backends, "told", set())
    monkeypatch.setattr(libraries, "triton_interprets", lambda: False)
    plug_in(monkeypatch, (9, 0))
    yield state
    backends.forget_choices()


def plug_in(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], built: tuple[str, ...] = ARCHITECTURES):
    """GPUs of these compute capabilities, the first of them current, and a library compiled for ``built``."""
    properties = [SimpleNamespace(major=major, minor=minor) for major, minor in capabilities]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: len(properties) > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])
    monkeypatch.setattr(libraries, "ARCHITECTURES", tuple(map(libraries.Architecture.parse, built)))
    backends.forget_choices()


def chosen_for_sampling(requested: str, device: torch.device, dtype: torch.dtype) -> Backend:
    return backends.choose("deformable_sample", requested, device, dtype).backend


@pytest.mark.parametrize(
    ("device", "dtype", "missing", "chosen"),
    [
        (CPU, torch.float32, (), Backend.CPU),
        (CPU, torch.float64, (), Backend.CPU),
        (CPU, torch.bfloat16, (Backend.CUDA, Backend.TRITON), Backend.CPU),
        (CUDA, torch.float16, (), Backend.CUDA),
        (torch.device("cuda"), torch.float16, (), Backend.CUDA),
        (CUDA, torch.float32, (Backend.CUDA,), Backend.TRITON),
        (CUDA, torch.float64, (), Backend.REFERENCE),
        (torch.device("mps"), torch.float32, (), Backend.REFERENCE),
    ],
    ids=str,
)
def test_auto_takes_the_best_there_is(
    everything_there: dict, device: torch.device, dtype: torch.dtype, missing: tuple[Backend, ...], chosen: Backend
) -> None:
    everything_there.update(dict.fromkeys(missing, "not built"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen_for_sampling("auto", device, dtype) is chosen
        assert public.choose("auto", device, dtype) is chosen


BOTH_OF_CUDA, BOTH_OF_TRITON = Choice(Backend.CUDA, Backend.CUDA), Choice(Backend.TRITON, Backend.TRITON)
ON_CUDA = {
    "sampling": ("deformable_sample", "auto", (), BOTH_OF_CUDA),
    "sampling by name": ("deformable_sample", "cuda", (), BOTH_OF_CUDA),
    "attention": ("deformable_attention", "auto", (), Choice(Backend.CUDA, Backend.TRITON)),
    "attention by Triton": ("deformable_attention", "triton", (), BOTH_OF_TRITON),
    "attention by one without it": ("deformable_attention", "cuda", (), Choice(Backend.CUDA, None)),
    "attention by PyTorch": ("deformable_attention", "reference", (), Choice(Backend.REFERENCE, Backend.REFERENCE)),
    "head": ("offset_head", "auto", (), Choice(Backend.CUDA, Backend.TRITON)),
    "head by one without it": ("offset_head", "cuda", (), Choice(Backend.CUDA, None)),
    "head without CUDA": ("offset_head", "auto", (Backend.CUDA,), BOTH_OF_TRITON),
    "head without Triton": ("offset_head", "auto", (Backend.TRITON,), Choice(Backend.CUDA, None)),
}


@pytest.mark.parametrize(("operation", "requested", "missing", "choice"), ON_CUDA.values(), ids=ON_CUDA)
def test_each_operation_gets_the_best_that_has_kernels_for_it(
    everything_there: dict, operation: str, requested: str, missing: tuple[Backend, ...], choice: Choice
) -> None:
    everything_there.update(dict.fromkeys(missing, "not built"))
    assert backends.choose(operation, requested, CUDA, torch.float32) == choice
    assert backends.choose(operation, Backend(requested), CUDA, torch.float32) == choice


def test_where_nothing_has_kernels_auto_is_plain_pytorch_without_any(everything_there: dict) -> None:
    for operation in backends.KERNELS:
        choice = backends.choose(operation, "auto", torch.device("mps"), torch.float32)
        assert choice == Choice(Backend.REFERENCE, None)


@pytest.mark.parametrize("operation", backends.KERNELS)
def test_the_table_of_kernels_is_what_was_registered(operation: str) -> None:
    """Of what is installed here: the dispatcher has a kernel for each entry of the table, and for no other."""
    name = {"deformable_attention": "sampled_attention"}.get(operation, operation)
    for backend, suffix, keys in DISPATCHED:
        if backends.MISSING[backend] is None:
            for key in keys:
                listed = backend in backends.KERNELS[operation][key.lower()]
                interpreted = key == "CPU" and backend is Backend.TRITON and libraries.triton_interprets()
                registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"stable_sam_cuda::{name}{suffix}", key)
                assert registered == (listed or interpreted), (backend, key)


def test_a_missing_kernel_is_said_once(everything_there: dict) -> None:
    everything_there[Backend.CPU] = "not built: no C++ compiler was found"
    with pytest.warns(MissingBackendWarning, match=r"'cpu' tensors.*cpu: not built: no C\+\+ compiler was found"):
        assert chosen_for_sampling("auto", CPU, torch.float32) is Backend.REFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen_for_sampling("auto", CPU, torch.float32) is Backend.REFERENCE
        assert chosen_for_sampling("auto", CPU, torch.float16) is Backend.REFERENCE


def test_the_warning_points_at_the_call(everything_there: dict) -> None:
    everything_there[Backend.CPU] = "not built"
    with pytest.warns(MissingBackendWarning) as caught:
        deformable_sample(torch.ones(1, 8, 3, 3), torch.zeros(1, 2, 3, 3), max_offset=1.0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("capability", "built", "chosen"),
    [
        ((8, 0), ARCHITECTURES, Backend.CUDA),
        ((8, 9), ("8.0",), Backend.CUDA),
        ((11, 0), ARCHITECTURES, Backend.CUDA),
        ((13, 0), ARCHITECTURES, Backend.CUDA),
        ((9, 0), (), Backend.CUDA),  # no record: nothing is known against it
        ((13, 0), ("9.0", "12.0"), Backend.TRITON),
        ((9, 0), ("8.0", "8.9"), Backend.TRITON),
        ((8, 7), ("8.0", "8.6", "9.0"), Backend.TRITON),
    ],
    ids=str,
)
def test_auto_takes_what_runs_on_the_device(
    everything_there: dict,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    built: tuple[str, ...],
    chosen: Backend,
) -> None:
    plug_in(monkeypatch, capability, built=built)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen_for_sampling("auto", CUDA, torch.float32) is chosen
    assert backends.choose("deformable_attention", "auto", CUDA, torch.float32).kernels is Backend.TRITON
    assert (backends.why_unavailable("cuda") is None) == (chosen is Backend.CUDA)


def test_a_device_that_nothing_serves_gets_plain_pytorch(
    everything_there: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, (7, 5))
    reasons = (
        "cuda: the device has compute capability 7.5, the library was compiled for 8.0, 8.6, 8.9, 9.0, 10.0+PTX, "
        "12.0+PTX; triton: the device has compute capability 7.5, Triton asks for 8.0"
    )
    with pytest.warns(MissingBackendWarning, match=re.escape(reasons)):
        assert chosen_for_sampling("auto", CUDA, torch.float32) is Backend.REFERENCE
    assert backends.choose("deformable_attention", "auto", CUDA, torch.float32).kernels is None
    assert backends.available() == (Backend.CPU, Backend.REFERENCE)


def test_each_of_several_gpus_has_its_own_choice(everything_there: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, (7, 5), (9, 0), (8, 6), built=("9.0",))
    devices = [torch.device("cuda", index) for index in range(3)]
    with pytest.warns(MissingBackendWarning) as caught:
        chosen = [chosen_for_sampling("auto", device, torch.float16) for device in devices]
        assert chosen == [chosen_for_sampling("auto", device, torch.float16) for device in devices]
    assert chosen == [Backend.REFERENCE, Backend.CUDA, Backend.TRITON]
    assert len(caught) == 1
    assert backends.why_unavailable("cuda") is None, "one of them has it"
    assert "capability 8.6" in str(backends.why_unavailable("cuda", devices[2]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert chosen_for_sampling("auto", torch.device("cuda"), torch.float16) is Backend.CUDA
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert chosen_for_sampling("auto", torch.device("cuda"), torch.float16) is Backend.TRITON


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "capability 7.5, the library was compiled for 9.0, 10.0"),
        ("triton", "capability 7.5, Triton asks for 8.0"),
    ],
)
def test_a_backend_asked_for_on_a_device_that_it_does_not_serve(
    everything_there: dict, monkeypatch: pytest.MonkeyPatch, backend: str, message: str
) -> None:
    plug_in(monkeypatch, (7, 5), built=("9.0", "10.0"))
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=f"backend '{backend}' is not available: .*{message}"):
            chosen_for_sampling(backend, CUDA, torch.float32)


def test_a_choice_is_made_once(everything_there: dict) -> None:
    def choices() -> list[Choice]:
        return [
            backends.choose(operation, requested, CUDA, torch.float32)
            for operation, requested in itertools.product(backends.KERNELS, ("auto", Backend.TRITON))
        ]

    first = choices()
    everything_there.update(dict.fromkeys((Backend.CUDA, Backend.TRITON), "taken away"))
    assert choices() == first
    backends.forget_choices()
    with pytest.raises(BackendUnavailableError, match="taken away"), pytest.warns(MissingBackendWarning):
        choices()


@pytest.mark.parametrize("backend", ["fast", None, ["cpu"], 3], ids=str)
def test_what_is_no_backend_is_named(backend: object) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(f"backend: expected one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got {backend!r}"),
    ):
        backends.choose("deformable_sample", backend, CPU, torch.float32)


def test_the_choice_for_a_gpu_is_traced_into_one_graph(everything_there: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def double_on_triton(x: torch.Tensor) -> torch.Tensor:
        kernels = backends.choose("offset_head", "auto", CUDA, torch.float32).kernels
        return 2 * x if kernels is Backend.TRITON else x

    plug_in(monkeypatch, built=("9.0",))  # torch.compile itself would ask the GPU
    monkeypatch.setattr(backends, "capability_of", lambda device: (8, 6))
    compiled = torch.compile(double_on_triton, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2, 2]


WITHOUT_TOUCHING_CUDA = """
import torch
touched = []
for module, name in ((torch._C, "_cuda_getDeviceCount"), (torch._C, "_cuda_init"), (torch.cuda, "_lazy_init")):
    setattr(module, name, lambda *_, name=name: touched.append(name) or 0)
import stable_sam_cuda
from stable_sam_cuda import backends
sampler = stable_sam_cuda.DeformableSampler(8, token_channels=8, max_offset=1.0)
sampler(torch.ones(1, 8, 3, 3), torch.ones(1, 8)).sum().backward()
print(touched)
"""


def test_the_cpu_never_initialises_cuda() -> None:
    """A process that forks, as a DataLoader does, must not have initialised it: its children could not use it."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TOUCHING_CUDA], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "message"),
    [
        ("cpu", CUDA, torch.float32, "backend: .*'cpu' does not take tensors on 'cuda'"),
        ("cuda", CPU, torch.float32, "backend: .*'cuda' does not take tensors on 'cpu'"),
        ("triton", CUDA, torch.float64, "backend: .*'triton' takes float32, float16, bfloat16, got float64"),
        (
            "fast",
            CPU,
            torch.float32,
            "backend: expected one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got 'fast'",
        ),
    ],
)
def test_a_backend_that_does_not_fit_is_refused(
    everything_there: dict, requested: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_for_sampling(requested, device, dtype)


def test_a_backend_asked_for_is_never_replaced(everything_there: dict) -> None:
    everything_there[Backend.CUDA] = "not built: nvcc was not found"
    with pytest.raises(BackendUnavailableError, match="nvcc was not found"):
        chosen_for_sampling("cuda", CUDA, torch.float32)


def test_every_backend_is_there_or_explained() -> None:
    for backend in Backend:
        reason = backends.why_unavailable(backend)
        assert (backend is Backend.AUTO) or (reason is None) == (backend in backends.available())
        assert reason is None or len(reason) > 10
    assert Backend.REFERENCE in backends.available()


def test_public_names_are_there() -> None:
    import stable_sam_cuda

    for name in stable_sam_cuda.__all__:
        assert getattr(stable_sam_cuda, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        stable_sam_cuda.nonsense  # noqa: B018
