"""What is decided or lost while a user's files are read, said in words; names of files as printable text."""

import os
import warnings
from os import PathLike


class DataWarning(UserWarning):
    """A file of the user's was read by a rule that the user may want to know of.

    ``reason`` is the same text for all files that the rule concerns, so that they can be counted; ``subject`` is the
    file, or the place in it.
    """

    def __init__(self, reason: str, subject: str = "") -> None:
        super().__init__(f"{subject}: {reason}" if subject else reason)
        self.reason, self.subject = reason, subject


def note(reason: str, subject: str | PathLike[str] = "") -> None:
    """Issue a `DataWarning`; thread-safe, as long as nobody changes the filters of warnings meanwhile."""
    warnings.warn(DataWarning(reason, printable(subject)), stacklevel=2)


def printable(name: str | PathLike[str]) -> str:
    r"""A file's name as text that any terminal and any JSON file takes.

    Bytes that are no UTF-8 become ``\xe9`` and the like, control characters (a line feed, an escape sequence) too.
    Names that are printable already stay as they are.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
