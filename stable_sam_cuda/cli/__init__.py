"""The command line ``stable-sam``: one file a verb, one line here for each."""

from stable_sam_cuda.cli.application import app
from stable_sam_cuda.cli.automask import automask
from stable_sam_cuda.cli.doctor import doctor
from stable_sam_cuda.cli.evaluate import evaluate
from stable_sam_cuda.cli.options import PromptCommand, VerbCommand
from stable_sam_cuda.cli.segment import segment
from stable_sam_cuda.cli.train import train

__all__ = ["app"]

app.command(cls=PromptCommand)(segment)
app.command(cls=VerbCommand)(automask)
app.command(cls=VerbCommand)(train)
app.command(cls=VerbCommand)(evaluate)
app.command(cls=VerbCommand)(doctor)
