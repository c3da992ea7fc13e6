"""Distributions built from a copy of the tree, and environments in which they are installed."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from shutil import copy2

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A command's result; its whole output where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git has or would take, as a clean clone has them: nothing built lies among them."""
    tree = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="session")
def distributions(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    # What the installed build compiled of the very same sources need not be compiled again; a file that the sdist lacks
    # is taken from beside the objects, and missed there.
    environment = os.environ | {"STABLE_SAM_OBJECTS": str(ROOT / "build" / "objects")}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source_tree, env=environment)
    return folder


@pytest.fixture(scope="session")
def plain_wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with nothing compiled in it."""
    folder = tmp_path_factory.mktemp("plain")
    environment = os.environ | {"STABLE_SAM_BUILD": "none"}
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source_tree, env=environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Installs a wheel into a new environment and returns the environment's folder of commands.

    The dependencies, torch above all, are borrowed from the running environment by a .pth file instead of being
    installed again; files of that kind lying there, such as an editable installation of this package, are not
    followed, so the package can only come from the wheel.
    """

    def into_new_environment(wheel: Path) -> Path:
        environment = tmp_path_factory.mktemp("environment")
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        commands = environment / "bin"
        pip = [sys.executable, "-m", "pip", "--python", commands / "python"]
        run(*pip, "install", "--no-deps", "--no-index", wheel)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
        (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return commands

    return into_new_environment
