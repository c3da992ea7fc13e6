"""JSON from files that users made."""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from stable_sam_cuda.notes import note, printable


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file, in UTF-8 or UTF-16, with or without a byte order mark.

    A name that is given twice inside of it is noted: the last one counts.

    Args:
        what: what the file should be, for the message.

    Raises:
        ValueError: it is no JSON, too deeply nested, or its outermost object gives a name twice.
        OSError: it cannot be read.
    """
    twice: list[str] = []  # a name given twice in each object that has one
    outermost: list[str] = []  # those of the object that was read last

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        outermost.clear()
        if len(content) < len(pairs):
            outermost.append(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
            twice.extend(outermost)
        return content

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=whole)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: expected {what}, got no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{printable(path)}: expected {what}, got JSON that is nested too deeply") from error
    if outermost and isinstance(content, dict):
        raise ValueError(f"{printable(path)}: expected each name once, got {reprlib.repr(outermost[0])} twice")
    if twice:
        note(
            "a name is given twice in an object of the JSON file; the last one counts",
            f"{printable(path)}: {twice[0]!r}",
        )
    return content
