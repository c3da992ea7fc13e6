"""What the user did wrong, said in one line, with exit code 2."""

import errno
import functools
import inspect
import os
import re
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar, get_args, get_type_hints

import torch
import typer

from stable_sam_cuda.backends import BackendUnavailableError
from stable_sam_cuda.cli.application import USAGE_ERROR
from stable_sam_cuda.cli.console import say_error
from stable_sam_cuda.cli.notices import notices_shown
from stable_sam_cuda.extras import install_command, missing_extra
from stable_sam_cuda.notes import printable

USER_ERRORS = (ValueError, TypeError, OSError, BackendUnavailableError, MemoryError, torch.OutOfMemoryError)

# What the library calls an argument that an option of another name sets.
OPTION_OF = {"name": "model", "root": "data", "folder": "out", "kinds": "prompts"}

# Beginnings of what torch raises as a bare RuntimeError where memory is used up.
NO_MEMORY = re.compile(r"can't allocate memory.*?(tried to allocate [\d.]+ \w+)|out of memory", re.DOTALL)

P = ParamSpec("P")
R = TypeVar("R")


def one_line(error: BaseException, options: Collection[str] = ()) -> str:
    """Message of the error without line breaks, an option of the verb under its own name; its class without message.

    Args:
        options: the verb's options, as Python spells them.
    """
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        place = f"{printable(os.fsdecode(error.filename))}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{place}{error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or type(error) is RuntimeError:
        return f"memory: expected enough of it for this input, got: {text or 'none left'}"
    text = text or type(error).__name__
    named = re.match(r"(\w[\w-]*)((?: '[^']*')?: )", text)
    if named:
        name = OPTION_OF.get(named[1], named[1]).replace("-", "_")
        if name in options:
            return f"--{name.replace('_', '-')}{named[2]}{text[named.end() :]}"
    return text


def options_of(command: Callable) -> set[str]:
    """Names of the options of a verb; its arguments, such as PHOTO, are none."""
    hints = get_type_hints(command, include_extras=True)
    arguments = {
        name for name, hint in hints.items() if any(type(one).__name__ == "ArgumentInfo" for one in get_args(hint))
    }
    return set(inspect.signature(command).parameters) - arguments


def explain_user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a verb: an error that the input caused becomes one red line and exit code 2.

    ``ValueError``, ``TypeError``, ``OSError`` and ``BackendUnavailableError`` are what this package raises for bad
    arguments, bad files and missing backends; memory that does not suffice is the input's fault too. Training and
    evaluation need the extra ``train``, and say so where it is missing. Anything else is a defect of the program and
    keeps its traceback. What reading the files lost or decided is said meanwhile.
    """
    options = options_of(command)

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with notices_shown():
                return command(*args, **kwargs)
        except ImportError as error:
            say_error(_missing(error))
            raise typer.Exit(USAGE_ERROR) from error
        except typer.Exit:
            raise
        except (*USER_ERRORS, RuntimeError) as error:
            closed_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
            if closed_pipe or not (isinstance(error, USER_ERRORS) or NO_MEMORY.search(str(error))):
                raise
            say_error(one_line(error, options))
            raise typer.Exit(USAGE_ERROR) from error

    return guarded


def _missing(error: ImportError) -> str:
    """The line for a package that is not there; raises the error again where it is a defect of ours."""
    text = " ".join(str(error).split())
    name = error.name or ""
    if name.startswith("stable_sam_cuda"):
        raise error
    if "pip install" in text:
        return text
    if not isinstance(error, ModuleNotFoundError):
        raise error
    return missing_extra(name.partition(".")[0]) if text.startswith("No module") else f"{text}: {install_command()}"
