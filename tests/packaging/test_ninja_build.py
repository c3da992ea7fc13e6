"""build_tools/ninja_build.py: what is compiled again, and what is said where that fails."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ALL = ["csrc/cpu/one.cpp", "csrc/cpu/two.cpp"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def load(tree: Path) -> ModuleType:
    """The build tools as they stand in another tree."""
    (tree / "build_tools").mkdir()
    path = shutil.copy(ROOT / "build_tools" / "ninja_build.py", tree / "build_tools")
    specification = spec_from_file_location("ninja_build_under_test", path)
    assert specification is not None and specification.loader is not None
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_sources(tree: Path) -> Path:
    """Two sources, of which the first includes a header."""
    folder = tree / "csrc" / "cpu"
    folder.mkdir(parents=True)
    (tree / "csrc" / "value.h").write_text("constexpr int kValue = 1;\n")
    (folder / "one.cpp").write_text('#include "../value.h"\nint one() { return kValue; }\n')
    (folder / "two.cpp").write_text("int two() { int unused; return 2; }\n")
    return tree


class Build:
    """Builds the library of a tree, and knows what was compiled for it."""

    def __init__(self, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.module, self.capsys = load(tree), capsys

    def library(self, *flags: str, versions: str = "1", compiler: str = "g++"):
        objects = {f"cpu/{Path(source).name}.o": (source, [compiler, "-fPIC", *flags]) for source in ALL}
        return self.module.Library("cpu", objects, ["g++", "-shared"], [], [versions], {})

    def __call__(self, *flags: str, **changes: str) -> list[str]:
        """The sources compiled, in order of their names."""
        self.capsys.readouterr()
        self.module.build(self.library(*flags, **changes))
        return sorted(re.findall(r"-c (\S+)", self.capsys.readouterr().out))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STABLE_SAM_OBJECTS", str(tmp_path / "objects"))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    return write_sources(tmp_path / "tree")


@pytest.fixture
def build(tree: Path, capsys: pytest.CaptureFixture[str]) -> Build:
    return Build(tree, capsys)


def test_a_second_build_compiles_nothing(build: Build) -> None:
    assert build() == ALL
    assert build() == []


def test_a_header_recompiles_what_includes_it_and_nothing_else(build: Build, tree: Path) -> None:
    build()
    (tree / "csrc" / "value.h").write_text("constexpr int kValue = 2;\n")
    assert build() == ["csrc/cpu/one.cpp"]
    assert build() == []


def test_a_source_recompiles_alone(build: Build, tree: Path) -> None:
    build()
    (tree / "csrc" / "cpu" / "two.cpp").write_text("int two() { return 3; }\n")
    assert build() == ["csrc/cpu/two.cpp"]


def test_a_fresh_checkout_of_the_same_sources_compiles_nothing(
    build: Build, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build()
    checkout = write_sources(tmp_path / "checkout")
    assert (checkout / "csrc" / "value.h").stat().st_mtime_ns > (tree / "csrc" / "value.h").stat().st_mtime_ns
    again = Build(checkout, capsys)
    assert again() == []
    (checkout / "csrc" / "value.h").write_text("constexpr int kValue = 3;\n")
    os.utime(checkout / "csrc" / "value.h", (0, 0))
    assert again() == ["csrc/cpu/one.cpp"], "another content, though an older one"
    assert build() == ["csrc/cpu/one.cpp"]


def test_other_flags_compilers_or_versions_compile_all_again(build: Build) -> None:
    assert build() == ALL
    assert build("-O1") == ALL
    assert build("-O1", versions="2") == ALL
    assert build("-O1", versions="2") == []


def test_flags_arrive_as_they_are(build: Build, tree: Path) -> None:
    (tree / "csrc" / "cpu" / "two.cpp").write_text("const char* text() { return TEXT; }\n")
    build("-DTEXT=\"a $b  $$c 'd' #: e\"")
    assert b"a $b  $$c 'd' #: e\0" in (tree.parent / "objects" / "cpu" / "two.cpp.o").read_bytes()


def test_what_a_compiler_says_stays_beside_the_object(build: Build, tree: Path) -> None:
    objects = tree.parent / "objects" / "cpu"
    for _ in range(2):
        build("-Wall")
        assert "unused variable" in (objects / "two.cpp.o.log").read_text()
        assert (objects / "one.cpp.o.log").read_text() == ""


def test_a_header_that_is_gone_is_missed(build: Build, tree: Path) -> None:
    build()
    header = tree / "csrc" / "value.h"
    header.rename(tree / "kept")
    with pytest.raises(build.module.BuildSkippedError, match=r"value\.h: No such file"):
        build()
    (tree / "kept").rename(header)
    assert build() == ["csrc/cpu/one.cpp"]


def test_a_failing_compiler_is_quoted(build: Build, tree: Path) -> None:
    (tree / "csrc" / "cpu" / "two.cpp").write_text("int two() { return nothing; }\n")
    with pytest.raises(build.module.BuildSkippedError) as failure:
        build()
    assert str(failure.value).startswith("ninja failed:\nFAILED: ")
    assert re.search(r"csrc/cpu/two\.cpp:1:\d+: error: .nothing. was not declared", str(failure.value))
    assert not (tree.parent / "objects" / "cpu" / "library.so").exists()


def test_the_library_is_copied_out_whether_or_not_it_was_made_now(build: Build, tmp_path: Path) -> None:
    for name in ("first.so", "second.so"):
        build.module.build(build.library(), tmp_path / name)
    assert (tmp_path / "first.so").read_bytes() == (tmp_path / "second.so").read_bytes()


def test_builds_at_once_wait_for_each_other(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: build.module.build(build.library()), range(3)))
    said = capsys.readouterr().out
    assert sorted(re.findall(r"-c (\S+)", said)) == ALL
    assert said.count("no work to do") == 2


@pytest.mark.parametrize("jobs", ["3", None], ids=["3 jobs", "a job a core"])
def test_max_jobs_steers_ninja_and_nvcc(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: str | None
) -> None:
    if jobs:
        monkeypatch.setenv("MAX_JOBS", jobs)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Werror all-warnings")
    ninja = tmp_path / "ninja"
    ninja.write_text('#!/bin/sh\necho "$@" / $NVCC_APPEND_FLAGS\n')
    ninja.chmod(0o755)
    build.module.run_ninja([str(ninja), "-v"])
    expected = jobs or os.cpu_count()
    assert capsys.readouterr().out == f"-v -j {expected} / -Werror all-warnings --threads {expected}\n"


def test_another_number_of_jobs_compiles_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    monkeypatch.setenv("MAX_JOBS", "1")
    assert build() == []


@pytest.fixture
def without_ninja_of_pypi(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def look_in(folder: Path) -> None:
        monkeypatch.setitem(sys.modules, "ninja", None)
        monkeypatch.setenv("PATH", str(folder))

    return look_in


def test_a_missing_ninja_is_named(build: Build, tmp_path: Path, without_ninja_of_pypi: Callable[[Path], None]) -> None:
    without_ninja_of_pypi(tmp_path)
    with pytest.raises(build.module.BuildSkippedError, match="ninja was not found: pip install ninja"):
        build()


def test_the_ninja_on_the_path_serves(
    build: Build, tmp_path: Path, without_ninja_of_pypi: Callable[[Path], None]
) -> None:
    without_ninja_of_pypi(tmp_path)
    (tmp_path / "ninja").touch(0o755)
    assert build.module.find_ninja() == str(tmp_path / "ninja")
