"""JSON from files that users made."""

import json
from pathlib import Path
from typing import Any

from stable_sam_cuda.notes import printable


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file, in UTF-8 or UTF-16, with or without a byte order mark.

    Args:
        what: what the file should be, for the message.

    Raises:
        ValueError: it is no JSON, or too deeply nested.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{printable(path)}: expected {what}, got no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{printable(path)}: expected {what}, got JSON that is nested too deeply") from error
