"""Files that appear whole or not at all, folders that can take them, and JSON that users wrote."""

import errno
import glob
import json
import os
import reprlib
import secrets
import stat
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from stable_sam_cuda.notes import note, printable

NAME_BYTES = 200  # of the target's name in its partial file's: with what is added it stays below the usual 255
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a write, which knows no file's name


class _Guard:
    """Something that is collected when a writing is over, in whatever way it ended."""


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write; it becomes ``path`` when the block ends, and vanishes when the block raises.

    Permissions are those that ``open`` gives: of the umask, or of the file that is replaced. A link stays, and the
    file that it leads to is replaced. What is no regular file (``/dev/null``, a pipe) cannot be replaced: it is
    written to.

    Args:
        sync: wait until the disk has it, so that a power failure leaves the old file or the new one. Without it, a
            power failure may leave half a file: for what has a checksum and can be made again.

    Raises:
        OSError: the file cannot be written; where the disk is full, the error names ``path``.
    """
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with open(path, "wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    partial = target.with_name(f".{_shortened(target.name)}.{secrets.token_hex(4)}.part")
    guard = _Guard()
    # The net below `finally`, which a second Ctrl-C may break off.
    net = weakref.finalize(guard, _remove, partial)
    try:
        with open(partial, "xb") as file:
            if target.exists():
                os.chmod(partial, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        if error.errno in WRITE_ERRORS and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        _remove(partial)
        net.detach()


def save_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``; a reader, or a kill, never meets half a file."""
    with atomic_write(path) as file:
        file.write(content)


def partial_files(path: Path) -> Iterator[Path]:
    """What is being written to ``path`` now, or was when a process was killed."""
    return path.parent.glob(f".{glob.escape(_shortened(path.name))}.*.part")


def require_folder(name: str, folder: Path, *, make: bool = True) -> None:
    """Make a folder where it is missing, and see that it can be written.

    Args:
        make: without it, a missing folder stays missing, and the one above it must be writable.

    Raises:
        ValueError: it cannot be made or written; the message begins with ``name`` and says in which folder above it
            the fault lies.
    """
    above = folder.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder if make else above).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if above != folder.absolute():
            reason = f"it cannot be made in {printable(above)}: {reason}"
        raise ValueError(f"{name}: expected a folder that can be written, got {printable(folder)}: {reason}") from error


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


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:NAME_BYTES])
