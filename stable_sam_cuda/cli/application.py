"""The application itself: its name, its help, ``--version``."""

from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(
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
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the verb."""
