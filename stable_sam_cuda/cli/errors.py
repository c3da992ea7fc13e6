"""What the user did wrong, said in one line, with exit code 2."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import typer
from rich.console import Console
from rich.text import Text

from stable_sam_cuda.backends import BackendUnavailableError

USAGE_ERROR = 2
USER_ERRORS = (ValueError, TypeError, OSError, BackendUnavailableError, torch.cuda.OutOfMemoryError)

P = ParamSpec("P")
R = TypeVar("R")


def one_line(error: BaseException) -> str:
    """Message of the error without line breaks; its class name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def explain_user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a verb: an error that the input caused becomes one red line and exit code 2.

    ``ValueError``, ``TypeError``, ``OSError`` and ``BackendUnavailableError`` are what this package raises for bad
    arguments, bad files and missing backends. Training and evaluation need the extra ``train``, and say so where it is
    missing. Anything else is a defect of the program and keeps its traceback.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("stable_sam_cuda"):
                raise
            say(f"{one_line(error)}: pip install 'stable_sam_cuda[train]'")
            raise typer.Exit(USAGE_ERROR) from error
        except USER_ERRORS as error:
            say(one_line(error))
            raise typer.Exit(USAGE_ERROR) from error

    return guarded


def say(message: str) -> None:
    """One red line on stderr."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message))
