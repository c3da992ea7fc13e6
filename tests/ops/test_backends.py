"""Which backend is chosen, what is said where one is missing, and imports without what is optional."""

import subprocess
import sys
import warnings

import pytest
import torch

from stable_sam_cuda import Backend, BackendUnavailableError, MissingBackendWarning, _extension, backends

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def everything_there(monkeypatch: pytest.MonkeyPatch) -> dict[Backend, str | None]:
    """All backends available, whatever this machine has; tests take some away."""
    state = dict.fromkeys(backends._UNAVAILABLE)
    monkeypatch.setattr(backends, "_UNAVAILABLE", state)
    monkeypatch.setattr(backends, "_warned", set())
    return state


@pytest.mark.parametrize(
    ("device", "dtype", "missing", "chosen"),
    [
        (CPU, torch.float32, (), Backend.CPU),
        (CPU, torch.float64, (), Backend.CPU),
        (CPU, torch.bfloat16, (Backend.CUDA, Backend.TRITON), Backend.CPU),
        (CUDA, torch.float16, (), Backend.CUDA),
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
        assert backends.choose("auto", device, dtype) is chosen


def test_a_missing_kernel_is_said_once(everything_there: dict) -> None:
    everything_there[Backend.CPU] = "not built: no C++ compiler was found"
    with pytest.warns(MissingBackendWarning, match=r"'cpu' tensors.*cpu: not built: no C\+\+ compiler was found"):
        assert backends.choose("auto", CPU, torch.float32) is Backend.REFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", CPU, torch.float32) is Backend.REFERENCE


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
        backends.choose(requested, device, dtype)


def test_a_backend_asked_for_is_never_replaced(everything_there: dict) -> None:
    everything_there[Backend.CUDA] = "not built: nvcc was not found"
    with pytest.raises(BackendUnavailableError, match="nvcc was not found"):
        backends.choose("cuda", CUDA, torch.float32)


def test_every_backend_is_there_or_explained() -> None:
    for backend in Backend:
        reason = backends.why_unavailable(backend)
        assert (backend is Backend.AUTO) or (reason is None) == (backend in backends.available())
        assert reason is None or len(reason) > 10
    assert Backend.REFERENCE in backends.available()


def test_the_build_record_covers_both_libraries() -> None:
    libraries = _extension.build_info()["libraries"]
    assert set(libraries) == {"_ops_cpu", "_ops_cuda"}
    assert all(facts["built"] or facts["reason"] for facts in libraries.values())


WITHOUT_OPTIONAL_PACKAGES = """
import sys
for name in ("torchvision", "segment_anything", "triton", "cv2", "safetensors"):
    sys.modules[name] = None
import torch, stable_sam_cuda
output = stable_sam_cuda.deformable_sample(torch.ones(1, 8, 3, 3), torch.zeros(1, 2, 3, 3), max_offset=1.0)
assert output.shape == (1, 8, 3, 3)
print(stable_sam_cuda.backends.why_unavailable("triton"))
"""


def test_imports_and_runs_without_torchvision_and_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_OPTIONAL_PACKAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    import stable_sam_cuda

    for name in stable_sam_cuda.__all__:
        assert getattr(stable_sam_cuda, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        stable_sam_cuda.nonsense  # noqa: B018
