"""Who may know whom: the package's folders stand on floors, and every import goes down.

    cli -> training, evaluation -> sam -> data, visualize -> modules -> ops -> the ground floor

A folder knows the folders below it and itself; those that share a floor do not know each other. The imports are read
from the source, so that one inside a function counts, too.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "stable_sam_cuda"
FLOORS = (  # from the top; a name is a folder's, or that of a file beside the folders
    ("__init__", "__main__"),
    ("cli",),
    ("training", "evaluation"),
    ("sam",),
    ("data", "visualize"),
    ("modules",),
    ("ops",),
    ("kernels",),
    ("devices", "files", "progress"),
    ("extras", "notes"),
)
# Files beside the folders that belong to one of them.
HOMES = dict.fromkeys(("functional", "backends"), "ops")


class Import(NamedTuple):
    """An import of this package, and where it stands."""

    importer: str
    imported: str
    place: str


def part_of(name: str) -> str:
    """The folder or file of the package that a dotted name below it belongs to."""
    part = name.split(".")[0]
    return HOMES.get(part, part)


def floor_of(part: str) -> int:
    """The number of its floor from the top, -1 where `FLOORS` does not know it."""
    return next((number for number, names in enumerate(FLOORS) if part in names), -1)


def imports_of(path: Path, root: Path = PACKAGE) -> Iterator[Import]:
    """Every import of another part of the package that a file has."""
    relative = path.relative_to(root).with_suffix("")
    importer = part_of(relative.parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [root.name, *relative.parts[:-1]]
            base = ".".join(inside[: len(inside) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from stable_sam_cuda import backends` is an import of that file, not of the package's face.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == root.name else [module]
        else:
            continue
        for name in names:
            if name.split(".")[0] == root.name:
                imported = part_of(name.removeprefix(root.name).removeprefix("."))
                if floor_of(imported) < 0:
                    imported = "__init__"  # a name that the package's face gives
                if imported != importer:
                    yield Import(importer, imported, f"{relative.as_posix()}.py, line {node.lineno}")


def all_imports(root: Path = PACKAGE) -> list[Import]:
    return [found for path in sorted(root.rglob("*.py")) for found in imports_of(path, root)]


def against_the_order(imports: list[Import]) -> list[str]:
    """What is wrong with each import that does not go down, in words."""
    return [
        f"{one.place}: {one.importer} imports {one.imported}, which stands "
        + ("above it" if floor_of(one.imported) < floor_of(one.importer) else "on the same floor")
        for one in imports
        if floor_of(one.imported) <= floor_of(one.importer)
    ]


def test_every_folder_and_file_has_a_floor() -> None:
    parts = {part_of(path.relative_to(PACKAGE).with_suffix("").parts[0]) for path in PACKAGE.rglob("*.py")}
    homeless = sorted(part for part in parts if floor_of(part) < 0)
    assert not homeless, f"FLOORS in {Path(__file__).name} does not say where these stand: {', '.join(homeless)}"


def test_every_import_goes_down() -> None:
    wrong = against_the_order(all_imports())
    assert not wrong, "imports against the order of the floors:\n  " + "\n  ".join(wrong)


def circle_among(imports: list[Import]) -> str:
    """Parts that import each other in a ring, the first one being named again at the end; empty where there is none."""
    known: dict[str, set[str]] = {}
    for one in imports:
        known.setdefault(one.importer, set()).add(one.imported)
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


def test_no_folders_import_each_other_in_a_circle() -> None:
    ring = circle_among(all_imports())
    assert not ring, f"folders import each other: {ring}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from stable_sam_cuda.cli.machine import x", "training imports cli, which stands above it"),
        (
            "def f():\n    import stable_sam_cuda.evaluation.report",
            "imports evaluation, which stands on the same floor",
        ),
        ("from stable_sam_cuda import stabilize", "training imports __init__, which stands above it"),
        ("from ..cli import x", "training imports cli, which stands above it"),
        ("from stable_sam_cuda.data.samples import x", ""),
    ],
    ids=["upwards", "sideways within a function", "the package's face", "relative", "downwards"],
)
def test_an_import_against_the_order_is_found(source: str, said: str, tmp_path: Path) -> None:
    root = tmp_path / "stable_sam_cuda"
    for part in ("cli", "training", "evaluation", "data"):
        (root / part).mkdir(parents=True)
    (root / "training" / "loop.py").write_text(source)
    wrong = against_the_order(all_imports(root))
    assert [said in one for one in wrong] == ([True] if said else [])


def test_a_circle_is_found() -> None:
    there = [Import("cli", "training", ""), Import("training", "data", "")]
    assert circle_among(there) == ""
    ring = circle_among([*there, Import("data", "training", "")])
    assert ring in ("training -> data -> training", "data -> training -> data")
