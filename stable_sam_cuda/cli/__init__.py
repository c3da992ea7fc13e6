"""The command line ``stable-sam``: one file a verb, one line here for each."""

from collections.abc import Callable

from stable_sam_cuda.cli.application import app
from stable_sam_cuda.cli.automask import automask
from stable_sam_cuda.cli.doctor import doctor
from stable_sam_cuda.cli.evaluate import evaluate
from stable_sam_cuda.cli.options import PromptCommand, VerbCommand
from stable_sam_cuda.cli.segment import segment
from stable_sam_cuda.cli.train import train

__all__ = ["app"]


def help_of(verb: Callable) -> str:
    """Its docstring with a line a paragraph, so that the terminal's width alone breaks it."""
    return "\n\n".join(" ".join(part.split()) for part in (verb.__doc__ or "").split("\n\n"))


app.command(cls=PromptCommand, help=help_of(segment))(segment)
for verb in (automask, train, evaluate, doctor):
    app.command(cls=VerbCommand, help=help_of(verb))(verb)
