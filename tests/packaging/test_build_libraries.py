"""build_tools/libraries.py: what is compiled with which flags, and why a library cannot be built."""

import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "build_tools"))
from libraries import (
    Torch,
    cpu_library,
    cuda_architectures,
    cuda_compiler,
    cuda_library,
    find_torch,
    gencode_flags,
    host_compiler,
)
from ninja_build import BuildSkippedError


@pytest.fixture
def nvcc_that_knows(tmp_path: Path) -> Callable[..., str]:
    def make(*architectures: str, release: str = "13.0") -> str:
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir()
        listing = "".join(f"echo {name}\n" for name in architectures)
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V{release}.1" && exit\n{listing}')
        path.chmod(0o755)
        return str(path)

    return make


@pytest.mark.parametrize(
    ("known", "built"),
    [
        ("80 86 87 89 90", ["8.0", "8.6", "8.9", "9.0+PTX"]),
        ("75 80 86 89 90 100 120", ["8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0+PTX"]),
        ("80 86 89 90 100 103 110 120 121", ["8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0+PTX"]),
    ],
)
def test_the_newest_that_nvcc_knows_has_ptx(
    nvcc_that_knows: Callable[..., str], monkeypatch: pytest.MonkeyPatch, known: str, built: list[str]
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = nvcc_that_knows(*(f"compute_{number}" for number in known.split()))
    assert cuda_architectures(nvcc) == built


def test_the_architectures_asked_for_are_built(
    nvcc_that_knows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 12.0+PTX")
    assert cuda_architectures(nvcc_that_knows()) == ["9.0a", "12.0+PTX"]
    assert gencode_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(BuildSkippedError, match=r"expected entries such as 9\.0 or 9\.0\+PTX, got 'Hopper'"):
        gencode_flags(["Hopper"])


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_every_cuda_object_is_compiled_for_the_architectures_asked_for(
    nvcc_that_knows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = nvcc_that_knows(release=str(torch.version.cuda))
    monkeypatch.setenv("CUDA_HOME", str(Path(nvcc).parents[1]))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    library = cuda_library()
    assert library.facts["architectures"] == ["8.0", "9.0+PTX"]
    assert {source for source, _ in library.objects.values()} >= {
        "csrc/cuda/deformable_sample.cu",
        "csrc/cuda/register.cpp",
    }
    for name, (_, command) in library.objects.items():
        assert [word for word in command if "gencode" in word] == gencode_flags(["8.0", "9.0+PTX"]), name
    assert library.folder != cuda_library(["9.0"]).folder, "neither's objects take the place of the other's"


@pytest.mark.parametrize(
    ("torch_cuda", "release", "reason"),
    [
        (None, "13.0", r"torch 2\.0 was built without CUDA"),
        ("12.8", "13.0", r"nvcc 13\.0 does not fit torch's CUDA 12\.8: major versions differ"),
        ("13.0", None, r"nvcc was not found in \$CUDA_HOME/bin"),
    ],
    ids=["torch without CUDA", "other major version", "no nvcc"],
)
def test_an_nvcc_that_does_not_serve_is_explained(
    nvcc_that_knows: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    torch_cuda: str | None,
    release: str | None,
    reason: str,
) -> None:
    if release:
        nvcc_that_knows(release=release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildSkippedError, match=reason):
        cuda_compiler(Torch(tmp_path, "2.0", torch_cuda))


def test_torch_is_found_as_it_is() -> None:
    assert find_torch() == (Path(torch.__file__).parent, torch.__version__, torch.version.cuda)


def test_a_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libraries.find_spec", lambda name: None)
    with pytest.raises(BuildSkippedError, match="torch was not found while building"):
        find_torch()


def test_the_compiler_asked_for_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    assert host_compiler() == [str(compiler), "-pipe"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
def test_the_kernels_are_compiled_once_for_each_instruction_set() -> None:
    library = cpu_library()
    flags = {name: {word for word in command if word[:2] == "-m"} for name, (_, command) in library.objects.items()}
    assert flags.pop("cpu/kernels.cpp.baseline.o") == set()
    assert flags.pop("cpu/kernels.cpp.avx2.o") == {"-mavx2", "-mfma", "-mf16c"}
    assert "-mavx512f" in flags.pop("cpu/kernels.cpp.avx512.o")
    assert flags and not any(flags.values()), "what runs before the choice runs anywhere"
    others = [command for source, command in library.objects.values() if source != "csrc/cpu/kernels.cpp"]
    assert all("-DSTABLE_SAM_HAS_AVX512" in command for command in others)
