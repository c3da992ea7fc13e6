"""setup.py: what becomes of a library that cannot be built, and what a second build in place does."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SAMPLE, INFO = "csrc/cuda/sample.cu", "csrc/build_info.cpp"
# Compiles nothing: what it is called with becomes what it makes.
NVCC = f"""#!/bin/sh
[ "$1" = --version ] && echo "release {torch.version.cuda}, V1" && exit
said="$*"
while [ "$1" != -o ]; do shift; done
echo "$said" > "$2"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with this project's build and next to nothing to compile."""
    tree = tmp_path / "tree"
    for folder in ("csrc/cpu", "csrc/cuda", "kernels", "stable_sam_cuda"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tree)
    shutil.copytree(ROOT / "build_tools", tree / "build_tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "csrc" / "build_info.cpp", tree / "csrc")
    (tree / "stable_sam_cuda" / "__init__.py").touch()
    for name in ("csrc/cpu/kernels.cpp", SAMPLE):
        (tree / name).write_text("static int nothing() { return 0; }\n")
    nvcc = tree / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return tree


def build_in_place(tree: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    left_out = ("STABLE_SAM_OBJECTS", "STABLE_SAM_BUILD", "TORCH_CUDA_ARCH_LIST", "CXX")
    variables = {name: value for name, value in os.environ.items() if name not in left_out}
    variables |= {"CUDA_HOME": str(tree / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0"} | environment
    command = [sys.executable, *options, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)


@pytest.fixture
def failing_compiler(tree: Path) -> str:
    path = tree / "failing"
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "the compiler is unwell" >&2\nexit 1\n')
    path.chmod(0o755)
    return str(path)


def test_auto_records_why_a_library_is_missing(tree: Path, failing_compiler: str) -> None:
    stale = [tree / "stable_sam_cuda" / f"{name}{EXTENSION_SUFFIXES[0]}" for name in ("_ops_cpu", "_C")]
    for path in stale:
        path.touch()
    done = build_in_place(tree, CXX=failing_compiler, CUDA_HOME=str(tree))
    assert done.returncode == 0, done.stderr
    record = json.loads((tree / "stable_sam_cuda" / "_build_record.json").read_text())
    assert record["mode"] == "auto"
    assert record["libraries"]["_ops_cpu"]["built"] is False
    assert "the compiler is unwell" in record["libraries"]["_ops_cpu"]["reason"]
    reason = (
        "nvcc was not found in $CUDA_HOME/bin"
        if torch.version.cuda
        else f"torch {torch.__version__} was built without CUDA"
    )
    assert record["libraries"]["_ops_cuda"] == {"built": False, "reason": reason}
    assert not [path for path in stale if path.exists()], "what an earlier build left"


def test_force_fails_with_the_reason(tree: Path, failing_compiler: str) -> None:
    done = build_in_place(tree, CXX=failing_compiler, STABLE_SAM_BUILD="force")
    assert done.returncode != 0
    assert "STABLE_SAM_BUILD=force: _ops_cpu cannot be built: ninja failed:" in done.stderr
    assert "the compiler is unwell" in done.stderr


def test_none_builds_nothing(tree: Path) -> None:
    done = build_in_place(tree, STABLE_SAM_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert not (tree / "build").exists()
    assert [path.name for path in (tree / "stable_sam_cuda").iterdir()] == ["__init__.py"]


def test_an_unknown_mode_is_named(tree: Path) -> None:
    done = build_in_place(tree, STABLE_SAM_BUILD="always")
    assert done.returncode != 0
    assert "STABLE_SAM_BUILD: expected auto, force or none, got 'always'" in done.stderr


def record(tree: Path) -> dict:
    """What the _C that stands in place says."""
    script = "import json; from stable_sam_cuda import _C; print(json.dumps(_C.build_info()))"
    return json.loads(subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_builds_in_place_follow_what_is_asked_for_and_compile_nothing_twice(tree: Path) -> None:
    def build(*architectures: str) -> list[str]:
        """The sources compiled."""
        environment = {"STABLE_SAM_BUILD": "force", "TORCH_CUDA_ARCH_LIST": ";".join(architectures)}
        done = build_in_place(tree, "-X", "importtime", **environment)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\| +setuptools$", done.stderr, re.MULTILINE)
        assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE), "importing it takes longer than all the rest"
        (library,) = (tree / "stable_sam_cuda").glob("_ops_cuda*.so")
        (compiled,) = re.findall(r"\S+/sample\.cu\.o", library.read_text())
        numbers = [name.replace(".", "") for name in architectures]
        assert re.findall(r"code=sm_(\d+)", (tree / "build" / "objects" / compiled).read_text()) == numbers
        assert record(tree)["libraries"]["_ops_cuda"]["architectures"] == list(architectures)
        return re.findall(r"-c (\S+)", done.stdout)

    first = build("9.0")
    assert first == ["csrc/cpu/kernels.cpp"] * first.count("csrc/cpu/kernels.cpp") + [SAMPLE, INFO]
    assert record(tree)["libraries"]["_ops_cpu"]["built"]
    assert build("9.0") == []
    assert build("8.0", "9.0") == [SAMPLE, INFO]
    assert build("9.0") == [INFO], "the objects of both lists are kept, and the older library is put in place again"


def test_an_old_setuptools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.__version__", "65.5.0")
    specification = spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    with pytest.raises(
        SystemExit, match=r"setuptools: expected 77 or later, got 65\.5\.0\..*pip install 'setuptools>=77'.* ninja"
    ):
        specification.loader.exec_module(module_from_spec(specification))
