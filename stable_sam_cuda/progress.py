"""How far a long piece of work is: bars on a terminal, a plain line now and then elsewhere, always on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

FIRST_SECONDS = 10.0  # work that is done sooner has nothing to tell
NEXT_SECONDS = 60.0


def on_terminal() -> bool:
    """Whether stderr is a terminal, where a line can be drawn anew."""
    return sys.stderr is not None and sys.stderr.isatty()


class RunProgress(Protocol):
    """Hears how a run proceeds, stage by stage."""

    def begin(self, stage: str, total: int, completed: int = 0) -> None:
        """A stage of ``total`` parts, of which ``completed`` are done."""

    def advance(self, count: int = 1) -> None:
        """So many parts of the stage are done."""

    def note(self, text: str) -> None:
        """How the stage fares."""


class ProgressLines:
    """A `RunProgress` of plain lines on stderr: the first of a stage after ten seconds, then one a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, shown: Callable[[int], str] = str) -> None:
        self.clock, self.shown = clock, shown
        self.begin("", 0)

    def begin(self, stage: str, total: int, completed: int = 0) -> None:
        """A new stage of ``total`` parts."""
        self.stage, self.total, self.done, self.before = stage, total, completed, completed
        self.words = ""
        self.started = self.clock()
        self.due = self.started + FIRST_SECONDS

    def advance(self, count: int = 1) -> None:
        """So many parts are done; a line where one is due."""
        self.done += count
        now = self.clock()
        if now >= self.due and self.done < self.total:
            self.due = now + NEXT_SECONDS
            self.write()

    def note(self, text: str) -> None:
        """Words for the next line's end."""
        self.words = text

    def write(self) -> None:
        """A line at once."""
        seconds, made = self.clock() - self.started, self.done - self.before
        left = f", about {duration(seconds / made * (self.total - self.done))} left" if made > 0 else ""
        words = f"  {self.words}" if self.words else ""
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr: no reason to stop the work
            if sys.stderr is not None:
                print(
                    f"{self.stage}: {self.shown(self.done)} of {self.shown(self.total)}{left}{words}",
                    file=sys.stderr,
                    flush=True,
                )


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


class NoProgress:
    """A `RunProgress` that tells nobody."""

    def begin(self, stage: str, total: int, completed: int = 0) -> None:
        return

    def advance(self, count: int = 1) -> None:
        return

    def note(self, text: str) -> None:
        return


@contextmanager
def progress_shown(quiet: bool = False, transient: bool = False) -> Iterator[RunProgress]:
    """Bars that are on the terminal as long as the block runs, or plain lines where stderr is none.

    Args:
        quiet: neither, as for all but the first of several processes.
        transient: bars vanish at the end.
    """
    if quiet:
        yield NoProgress()
        return
    if not on_terminal():
        yield ProgressLines()
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=transient, redirect_stdout=False) as bars:
        yield ProgressBars(bars)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3 h 5 min``."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
