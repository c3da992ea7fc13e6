"""The application itself: its name, its help, ``--version``, and how it ends."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stable_sam_cuda.cli.console import say_error
from stable_sam_cuda.cli.ending import end_by_exception
from stable_sam_cuda.cli.options import TYPED_WORDS, UsageError

USAGE_ERROR = 2


def explain_usage(error: Any) -> str:
    """A wrong command line in one line: the option, what was expected, what came."""
    param, message = getattr(error, "param", None), error.message or ""
    if not isinstance(error, typer.BadParameter) or not message:
        return error.format_message().rstrip(".")
    if param is None:
        return message
    name = "/".join(param.opts)
    expected = re.search(r"should be (.*?)(?:,|$)|is not (a valid .*?)\.?$|is not in the range (.*?)\.?$", message)
    if expected is None:
        return f"{name}: {message}"
    wanted = next(filter(None, expected.groups()))
    for typers, ours in (
        ("a valid integer", "a whole number"),
        ("a valid number", "a number"),
        ("a valid float", "a number"),
        ("greater than or equal to ", "at least "),
        ("less than or equal to ", "at most "),
        ("x>=", "at least "),
    ):
        wanted = wanted.replace(typers, ours)
    return f"{name}: expected {wanted}, got {typed_value(param.opts, error.ctx)!r}"


def typed_value(options: Sequence[str], ctx: Any) -> str:
    """The last value of an option, as it was typed."""
    words = (ctx.meta.get(TYPED_WORDS) if ctx else None) or []
    value = ""
    for place, word in enumerate(words):
        option, equals, after = word.partition("=")
        if option in options:
            value = after if equals else "".join(words[place + 1 : place + 2])
    return value


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
