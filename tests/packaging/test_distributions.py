"""What is shipped: the sdist can be built from, the wheel runs where there is no compiler."""

import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_sdist_holds_all_sources_and_nothing_built(distributions: Path, source_tree: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("build_tools", "csrc", "kernels", "stable_sam_cuda")
    sources = [path for folder in folders for path in (source_tree / folder).rglob("*")]
    kinds = {".h", ".cuh", ".cpp", ".cu", ".py"}
    expected = {str(path.relative_to(source_tree)) for path in sources if path.suffix in kinds}
    assert expected <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "stable_sam_cuda/py.typed"} <= names
    assert "stable_sam_cuda/weights/sam_lite.safetensors" in names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_wheel_holds_the_package_and_nothing_else(distributions: Path, source_tree: Path) -> None:
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stable_sam_cuda"}
    assert any(name.startswith("stable_sam_cuda/_ops_cpu.") for name in names)
    assert any(name.startswith("stable_sam_cuda/_C.") for name in names)
    paths = (source_tree / "kernels").rglob("*.py")
    kernels = {f"stable_sam_cuda/{path.relative_to(source_tree)}" for path in paths}
    assert kernels and kernels <= set(names)
    assert {"stable_sam_cuda/py.typed", "stable_sam_cuda/weights/sam_lite.safetensors"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


@pytest.fixture(scope="module")
def commands(distributions: Path, install: Callable[[Path], Path]) -> Path:
    return install(next(distributions.glob("*.whl")))


def outside(commands: Path, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the new environment away from the repository, with no compiler in sight."""
    return subprocess.run(
        [str(commands / command[0]), *command[1:]],
        cwd=folder,
        env={"PATH": str(commands), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )


def test_wheel_imports_without_a_compiler(commands: Path, tmp_path: Path) -> None:
    script = (
        "import stable_sam_cuda as s; print(s.__file__);"
        "print(sum(p.numel() for p in s.DeformableSampler(256).parameters()));"
        "print(s.backends.why_unavailable('cpu'))"
    )
    done = outside(commands, "python", "-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    place, parameters, reason = done.stdout.splitlines()
    assert Path(place).is_relative_to(commands.parent), "the package came from elsewhere"
    assert parameters == "81829"
    assert reason == "None"
    assert done.stderr == ""


def test_wheel_segments_a_photo(commands: Path, tmp_path: Path) -> None:
    photo = str(ROOT / "examples" / "chelsea.png")
    done = outside(commands, "stable-sam", "segment", photo, "--box", "8", "0", "405", "299", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    mask = Image.open(tmp_path / "chelsea_mask.png")
    assert mask.size == Image.open(photo).size
    assert mask.getpixel((250, 150)) == 255, "the cat's face"
    assert mask.getpixel((440, 20)) == 0, "the corner behind it"
    assert json.loads((tmp_path / "chelsea.json").read_text())["backend"] == "cpu"


def test_package_without_compiled_operations_explains_itself(
    plain_wheel: Path, install: Callable[[Path], Path], tmp_path: Path
) -> None:
    commands = install(plain_wheel)
    script = (
        "import torch, stable_sam_cuda as s;"
        "print(s.backends.why_unavailable('cpu'));"
        "print(s.deformable_sample(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), max_offset=1.0).sum().item())"
    )
    done = outside(commands, "python", "-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    reason, total = done.stdout.splitlines()
    assert reason.startswith("not built")
    assert total == "18.0"
    assert done.stderr.count("MissingBackendWarning") == 1
