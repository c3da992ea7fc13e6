"""Several rows of the study at once on one machine, within a deadline."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

POLL_SECONDS = 0.2


class Turn(NamedTuple):
    """One row with one seed. ``shared`` names files that the first turn to need them makes: the others that need
    them wait until one has ended well."""

    row: str
    seed: int
    shared: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.row}-{self.seed}"


def run_turns(
    turns: Sequence[Turn], jobs: int, seconds: float, start: Callable[[Turn], subprocess.Popen]
) -> dict[str, str]:
    """Run turns, the first ones first, up to ``jobs`` at a time; how each of them ended, by name.

    "passed", "failed with exit code N", "out of time" (ended by its process group) or "not begun". ``start`` gives each
    process a session of its own.
    """
    deadline = time.monotonic() + seconds
    waiting, running = list(turns), {}
    made: set[str] = set()
    outcomes = {turn.name: "not begun" for turn in turns}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for turn, process in list(running.items()):
                if process.poll() is not None:
                    del running[turn]
                    code = process.returncode
                    made |= turn.shared if code == 0 else set()
                    outcomes[turn.name] = "passed" if code == 0 else f"failed with exit code {code}"
            busy = frozenset().union(*(turn.shared for turn in running)) - made
            ready = next((turn for turn in waiting if not turn.shared & busy), None)
            if ready is not None and len(running) < jobs:
                waiting.remove(ready)
                running[ready] = start(ready)
            else:
                time.sleep(POLL_SECONDS)
    finally:
        for turn, process in running.items():
            outcomes[turn.name] = "out of time"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcomes
