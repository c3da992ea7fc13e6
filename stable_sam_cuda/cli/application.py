"""The application itself: its name, its help, ``--version``, and how it ends."""

import re
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stable_sam_cuda.cli.console import say_error
from stable_sam_cuda.cli.ending import end_by_exception

USAGE_ERROR = 2

# typer brings its own copy of click, older ones use the package: this is the class of either.
UsageError: Any = typer.BadParameter.__bases__[0]


def explain_usage(error: Any) -> str:
    """A wrong command line in one line: the option, what was expected, what came."""
    param, message = getattr(error, "param", None), error.message or ""
    if isinstance(error, typer.BadParameter) and param is None and message:
        return message
    name = "/".join(getattr(param, "opts", None) or [])
    if kind := re.fullmatch(r"'?(.*?)'? is not a valid (.*?)\.?", message, re.DOTALL):
        number = {"integer": "a whole number", "float": "a number"}.get(kind[2], f"a valid {kind[2]}")
        return f"{name}: expected {number}, got {kind[1]!r}"
    if kind := re.fullmatch(r"'?(.*?)'? is not in the range (.*?)\.?", message, re.DOTALL):
        limits = re.sub(r"x>=(\S+?)", r"at least \1", kind[2])
        return f"{name}: expected {limits}, got {kind[1]}"
    return error.format_message().rstrip(".")


class Application(TyperGroup):
    """Group of verbs whose wrong use is told in one line, with exit code 2."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().make_context(*arguments, **options)
        except UsageError as error:
            self._refuse(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            self._refuse(error)

    def _refuse(self, error: Any) -> None:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise error
        verb = getattr(error.ctx, "command_path", None) or "stable-sam"
        say_error(f"{explain_usage(error)} ({verb} --help lists the options)")
        raise typer.Exit(USAGE_ERROR)


app = typer.Typer(
    cls=Application,
    name="stable-sam",
    help="Stable-SAM: the Segment Anything Model, steady under sloppy prompts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stable-sam {version('stable_sam_cuda')}")
        raise typer.Exit


@app.callback()
def main(
    ctx: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the verb."""
    ctx.call_on_close(end_by_exception())
