"""What becomes one line and exit code 2, and what keeps its traceback."""

from typing import Annotated

import pytest
import torch
import typer

from stable_sam_cuda.cli.errors import USAGE_ERROR, explain_user_errors


def raising(error):
    @explain_user_errors
    def command(photo: Annotated[str, typer.Argument()] = "", model: str = "", max_offset: int = 0, split: str = ""):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("box: expected\n  four numbers"), "error: box: expected four numbers"),
        (TypeError("sam: expected a Sam"), "error: sam: expected a Sam"),
        (OSError("disk full"), "error: disk full"),
        (OSError(28, "No space left on device", "x.png"), "error: x.png: No space left on device"),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), "the package cv2 is needed and not installed: "),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "pip install"),
        (ImportError("COCO needs a package: pip install it"), "error: COCO needs a package: pip install it"),
        (MemoryError(), "error: memory: expected enough of it for this input"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: memory: expected enough"),
        (RuntimeError("x: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory: "),
        (ValueError("name: expected one of vit_b"), "error: --model: expected one of vit_b"),
        (ValueError("max_offset: expected more"), "error: --max-offset: expected more"),
        (ValueError("split 'a': 3 are missing"), "error: --split 'a': 3 are missing"),
        (ValueError("photo [red]x[/x]: expected"), "error: photo [red]x[/x]: expected"),
        (ValueError("caf\udce9.jpg: a\x1b[31mb"), "error: caf\\xe9.jpg: a\\x1b[31mb"),
        (ValueError("x" * 500), "x" * 500),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:20]}" if isinstance(value, Exception) else "",
)
def test_user_error_is_one_line_and_exit_code_2(error, line, capsys):
    with pytest.raises(typer.Exit) as stopped:
        raising(error)()
    printed = capsys.readouterr().err
    assert stopped.value.exit_code == USAGE_ERROR
    assert line in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RuntimeError("shape mismatch"),
        ImportError("cannot import name 'x' from 'y'", name="y"),
        ModuleNotFoundError("No module named 'stable_sam_cuda.x'", name="stable_sam_cuda.x"),
    ],
    ids=["key", "runtime", "import", "own-module"],
)
def test_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        raising(error)()
