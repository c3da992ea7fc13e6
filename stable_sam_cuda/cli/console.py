"""What the command line says: results on stdout, everything else on stderr; plain lines, never folded or marked up."""

import contextlib
import io
import os
import sys

import typer
from rich.console import Console
from rich.table import Table

from stable_sam_cuda.notes import printable

WIDE = 1000  # characters of a table's line where no terminal sets the width


def tell(*lines: str) -> None:
    """Write lines to stdout, for verbs whose results are files that lie there already.

    A reader that has left is no fault, and neither is a full disk under the output: the files are there. The latter is
    said on stderr.
    """
    try:
        write(*lines)
    except OSError as error:
        _forget_stdout()
        if not isinstance(error, BrokenPipeError):
            say_note(f"standard output: could not be written ({error.strerror}); the files are complete")


def write(*lines: str) -> None:
    """Write lines to stdout.

    Raises:
        OSError: it is closed or full.
    """
    if sys.stdout is None:
        return
    for line in lines:
        typer.echo(_encodable(line, sys.stdout.encoding))


def table_lines(table: Table) -> str:
    """A table as text; where stdout is no terminal as wide as it needs."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    text = io.StringIO()  # a capture of rich's would write to stdout, if only nothing
    Console(file=text, highlight=False, force_terminal=terminal, width=None if terminal else WIDE).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def say_error(message: str) -> None:
    """One red line on stderr."""
    _say(typer.style("error: ", fg="red", bold=True), message)


def say_note(message: str) -> None:
    """One yellow line on stderr."""
    _say(typer.style("note: ", fg="yellow"), message)


def say_plain(message: str) -> None:
    """One line on stderr."""
    _say("", message)


def _say(head: str, message: str) -> None:
    if sys.stderr is None:
        return
    text = _encodable(printable(" ".join(message.split())), sys.stderr.encoding)
    with contextlib.suppress(OSError):  # nobody reads stderr: the exit code still tells
        typer.echo(head + text, file=sys.stderr)


def _encodable(text: str, encoding: str | None) -> str:
    """The text with what the stream cannot carry written out as an escape."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _forget_stdout() -> None:
    """Send what is still buffered for stdout nowhere, or Python fails on it once more at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
