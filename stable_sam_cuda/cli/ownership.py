"""Which files of a folder this package wrote, for what, and whether they are still as it left them.

A verb's JSON record lists the SHA-256 of every file written with it, says what it was written for, and carries a
digest of itself. A file that no intact record lists, or that has changed since, is the user's own.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

SEAL = "record_sha256"
MOST_BYTES = 2**28  # of a JSON file that is looked at


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own digest.

    Raises:
        ValueError: it holds NaN or infinity, which JSON has not.
    """
    return {**record, SEAL: _digest(record)}


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The record in a file; None where there is none, or it is not as this package wrote it."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            return None
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and SEAL in record:
            seal = record.pop(SEAL)
            if seal == _digest(record):
                return record
    except (OSError, ValueError, RecursionError):
        pass
    return None


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def state_of(path: Path) -> str | None:
    """What lies at a path: its SHA-256 where it is a file, "directory", "link" or "special"; None where nothing is.

    Raises:
        OSError: it cannot be told: the name is too long, or a folder cannot be read.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_ISDIR(mode):
        return "directory"
    return file_digest(path) if stat.S_ISREG(mode) else "special"
