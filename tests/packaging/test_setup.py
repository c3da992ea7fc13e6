"""setup.py: which architectures are built, and when an object is compiled again."""

import os
import re
import shutil
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    specification = spec_from_file_location("setup_under_test", path)
    assert specification is not None and specification.loader is not None
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc_that_knows(tmp_path: Path) -> Callable[..., str]:
    def make(*architectures: str) -> str:
        path = tmp_path / "nvcc"
        path.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in architectures))
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
    assert load(ROOT / "setup.py").cuda_architectures(nvcc) == built


def test_the_architectures_asked_for_are_built(
    nvcc_that_knows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = load(ROOT / "setup.py")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 12.0+PTX")
    assert setup.cuda_architectures(nvcc_that_knows()) == ["9.0a", "12.0+PTX"]
    assert setup.gencode_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(setup.BuildSkippedError, match=r"expected entries such as 9\.0 or 9\.0\+PTX, got 'Hopper'"):
        setup.gencode_flags(["Hopper"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_an_object_is_compiled_again_when_what_it_is_made_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABLE_SAM_OBJECTS", str(tmp_path / "objects"))
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    header, source = tmp_path / "csrc" / "value.h", tmp_path / "csrc" / "cpu" / "value.cpp"
    header.write_text("constexpr int kValue = 1;")
    source.write_text('#include "../value.h"\nint value() { return kValue; }')
    setup = load(Path(shutil.copy(ROOT / "setup.py", tmp_path)))
    commands: list[list[str]] = []
    run = setup.run
    monkeypatch.setattr(setup, "run", lambda command: commands.append(command) or run(command))

    def compile_with(*flags: str) -> Path:
        (made,) = setup.compile_objects([("csrc/cpu/value.cpp", ["g++", *flags])], "cpu")
        assert made.is_file() and made.with_suffix(".log").is_file()
        return made

    first = compile_with()
    os.utime(source)
    assert compile_with() == first and len(commands) == 1, "the same contents"
    assert len({first, compile_with("-O1")}) == len(commands) == 2, "another flag"
    header.write_text("constexpr int kValue = 2;")
    assert len({first, compile_with()}) == 2 and len(commands) == 3, "another header"
    header.unlink()
    with pytest.raises(setup.BuildSkippedError, match=re.escape("value.h: No such file")):
        compile_with()
    header.write_text("constexpr int kValue = 1;")
    assert compile_with() == first and len(commands) == 4, "the first is still there"


def test_an_old_setuptools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.__version__", "65.5.0")
    with pytest.raises(
        SystemExit, match=r"setuptools: expected 77 or later, got 65\.5\.0\..*pip install 'setuptools>=77'"
    ):
        load(ROOT / "setup.py")
