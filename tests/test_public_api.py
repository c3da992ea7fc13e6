"""What users import and type, against the list in public_api.json.

The list was written down before the package's files were moved. A change of what the public sees changes it, too:
``python tests/test_public_api.py`` writes it anew.
"""

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

LIST = Path(__file__).with_name("public_api.json")
MODULES = ("", ".functional", ".backends", ".modules", ".sam", ".visualize")
WITHOUT_LIST = {  # names that the documentation uses of a module without ``__all__``
    "stable_sam_cuda.backends": (
        "Backend",
        "BackendUnavailableError",
        "MissingBackendWarning",
        "UnfusedAttentionWarning",
        "available",
        "why_unavailable",
    )
}


def members(value: type) -> Iterator[tuple[str, Any]]:
    """The class's own methods, properties and values, inherited ones of this package included."""
    for kind in reversed(value.__mro__):
        if kind.__module__.startswith("stable_sam_cuda"):
            yield from ((name, part) for name, part in vars(kind).items() if not name.startswith("_"))
    if "__init__" in vars(value):
        yield "__init__", value.__init__


def described(value: object) -> object:
    """A signature without annotations, since those name the files of types; of a class, those of its members."""
    if isinstance(value, type):
        return {name: described(member) for name, member in sorted(dict(members(value)).items())}
    if isinstance(value, (staticmethod, classmethod)):
        return described(value.__func__)
    if inspect.isroutine(value):
        signature = inspect.signature(value)
        plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return type(value).__name__


def options_of(command: Any) -> dict[str, object]:
    """Names and defaults of what a command takes."""
    return {
        " ".join([*parameter.opts, *parameter.secondary_opts]): str(parameter.default)
        for parameter in command.params
        if parameter.name != "help"
    }


def public_api() -> dict[str, Any]:
    from stable_sam_cuda.cli import app

    listed: dict[str, Any] = {}
    for name in MODULES:
        module = import_module(f"stable_sam_cuda{name}")
        names = WITHOUT_LIST.get(module.__name__) or module.__all__
        listed[module.__name__] = {one: described(getattr(module, one)) for one in names}
    group: Any = typer.main.get_command(app)
    commands = {f"stable-sam {name}": options_of(command) for name, command in group.commands.items()}
    return listed | {"stable-sam": options_of(group)} | commands


@pytest.mark.parametrize("part", json.loads(LIST.read_text()) if LIST.exists() else [])
def test_nothing_that_the_public_sees_has_changed(part: str) -> None:
    found = json.loads(json.dumps(public_api()))
    assert found.get(part) == json.loads(LIST.read_text())[part]


def test_every_part_is_in_the_list() -> None:
    assert set(public_api()) == set(json.loads(LIST.read_text()))


if __name__ == "__main__":
    LIST.write_text(json.dumps(public_api(), indent=1, sort_keys=True) + "\n")
