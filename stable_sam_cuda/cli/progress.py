"""Progress bars of a run's stages."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBars:
    """A `RunProgress` with one bar a stage."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    def begin(self, stage: str, total: int, completed: int = 0) -> None:
        """A bar of its own for a new stage."""
        self.task = self.bars.add_task(stage, total=total, completed=completed, note="")

    def advance(self, count: int = 1) -> None:
        """Move the stage's bar."""
        self.bars.advance(self.task, count)

    def note(self, text: str) -> None:
        """Words behind the stage's bar."""
        self.bars.update(self.task, note=text)


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressBars]:
    """Bars that are on the console as long as the block runs."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        yield ProgressBars(bars)
