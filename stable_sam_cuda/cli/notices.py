"""What reading a user's files lost or decided, on stderr: the first of each reason, and the number of the others."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stable_sam_cuda.cli.console import say_note
from stable_sam_cuda.notes import DataWarning


class Notices:
    """`DataWarning`s by their reason, each file counted once."""

    def __init__(self) -> None:
        self.subjects: dict[str, set[str]] = {}
        self.lock = threading.Lock()

    def add(self, warning: DataWarning) -> None:
        """Say the first of a reason, count the others."""
        with self.lock:
            first = warning.reason not in self.subjects
            self.subjects.setdefault(warning.reason, set()).add(warning.subject)
            if first:
                say_note(str(warning))

    def finish(self) -> None:
        """Say how many more there were of each reason."""
        for reason, subjects in self.subjects.items():
            if len(subjects) > 1:
                say_note(f"... and {len(subjects) - 1:,} more: {reason}")
        self.subjects = {}


@contextmanager
def notices_shown() -> Iterator[Notices]:
    """Show every `DataWarning` of the block so; other warnings as before.

    It changes the filters of warnings, which all threads share, so the block must begin before threads do.
    """
    notices = Notices()
    first_process = os.environ.get("RANK", "0") == "0"  # under torchrun all of them read the same files
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        show_others = warnings.showwarning

        def show(message: Any, *arguments: Any, **options: Any) -> None:
            if not isinstance(message, DataWarning):
                show_others(message, *arguments, **options)
            elif first_process:
                notices.add(message)

        warnings.showwarning = show
        try:
            yield notices
        finally:
            notices.finish()
