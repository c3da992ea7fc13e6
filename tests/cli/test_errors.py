"""What becomes one line and exit code 2, and what keeps its traceback."""

import pytest
import typer

from stable_sam_cuda.cli.errors import USAGE_ERROR, explain_user_errors


def raising(error):
    @explain_user_errors
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("box: expected\n  four numbers"), "error: box: expected four numbers"),
        (TypeError("sam: expected a Sam"), "error: sam: expected a Sam"),
        (OSError("disk full"), "error: disk full"),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), "pip install 'stable_sam_cuda[train]'"),
    ],
    ids=["value", "type", "system", "missing-extra"],
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
    [KeyError("x"), ModuleNotFoundError("No module named 'stable_sam_cuda.x'", name="stable_sam_cuda.x")],
    ids=["key", "own-module"],
)
def test_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        raising(error)()
