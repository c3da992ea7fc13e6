"""Results on disk: whole sets of them or none, and never over what is not this package's own."""

import contextlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from stable_sam_cuda.cli.ending import signals_deferred
from stable_sam_cuda.cli.ownership import read_sealed, sealed, state_of
from stable_sam_cuda.notes import printable

SUFFIX = ".json"  # of a set's record


class Outputs:
    """A folder for the results of one run, which are staged in a hidden folder inside it.

    A context manager: a set of results that was not published leaves nothing, and a folder that was made for the run
    goes again where no set was.

    Args:
        directory: is made where it does not exist.
        overwrite: files that are not this package's own may be replaced.
        keep: files that may never be replaced: what the run reads.
    """

    def __init__(self, directory: Path, *, overwrite: bool = False, keep: Iterable[Path] = ()) -> None:
        self.directory, self.overwrite = directory, overwrite
        self.keep = {_identity(path) for path in keep} - {None}
        self.published = False
        self._claimed: dict[str, str] = {}
        self._made: list[Path] = []
        self._staging: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Outputs":
        """Make the directory and prove that it can be written to.

        Raises:
            OSError: it cannot.
        """
        try:
            with signals_deferred():
                self._prepare()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()

    def _prepare(self) -> None:
        # mkdir(parents=True) does not say which parents were missing, and those must go again after a failure.
        missing = [path for path in (self.directory, *self.directory.parents) if not os.path.lexists(path)]
        try:
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                self._made.insert(0, path)
            self._staging = tempfile.TemporaryDirectory(prefix=".stable-sam-", dir=self.directory)
        except OSError as error:
            parent = missing[-1].parent if missing and not self._made else None
            place = f" in {printable(parent)}" if parent not in (None, Path(".")) else ""
            raise OSError(
                f"--out {printable(self.directory)}: expected a directory that can be written to, "
                f"got: {error.strerror or error}{place}"
            ) from error

    def _clean_up(self) -> None:
        with signals_deferred():
            if self._staging is not None:
                self._staging.cleanup()
                self._staging = None
            if not self.published:
                with contextlib.suppress(OSError):  # somebody else has put a file there meanwhile
                    for path in self._made:
                        path.rmdir()

    def claim(
        self, stem: str, suffixes: Sequence[str], source: dict[str, Any], room: int = 0, what: str = "photograph"
    ) -> "Results":
        """Reserve the names ``stem`` + suffix, and ``stem.json`` for the record, before the work is done.

        Args:
            source: what the results are of. Earlier results of the same are replaced, as a whole; of another, refused.
            room: bytes that they need at least.
            what: what the source is, for messages.

        Raises:
            FileExistsError: a name is taken by what is not this package's own, or by another part of the run.
            OSError: there is too little space.
        """
        owner = printable(stem)
        for name in (stem + suffix for suffix in (*suffixes, SUFFIX)):
            # File systems that ignore case or the form of accents would hold one file for both.
            key = unicodedata.normalize("NFC", name).casefold()
            if key in self._claimed:
                raise FileExistsError(
                    f"--out {printable(self.directory)}: expected names of their own for each photograph, got "
                    f"{printable(name)} for {self._claimed[key]} and {owner}"
                )
            self._claimed[key] = owner
        free = shutil.disk_usage(self.directory).free
        if free < room:
            raise OSError(
                f"--out {printable(self.directory)}: expected about {room // 1024:,} KiB of space, "
                f"got {free // 1024:,} KiB"
            )
        return Results(self, stem, suffixes, source, what)

    @property
    def staging(self) -> Path:
        assert self._staging is not None
        return Path(self._staging.name)


class Results:
    """One set of results: files, and the record that lists them. See `Outputs.claim`."""

    def __init__(self, outputs: Outputs, stem: str, suffixes: Sequence[str], source: dict[str, Any], what: str) -> None:
        self.outputs, self.stem, self.what, self.source = (
            outputs,
            stem,
            what,
            json.loads(json.dumps(source)),
        )  # as it is read again
        self.names = [stem + suffix for suffix in suffixes]
        self.record_name = stem + SUFFIX
        self.removed: list[str] = []  # of earlier results that this set does not have
        earlier = read_sealed(outputs.directory / self.record_name) or {}
        of_the_same = earlier.get("source") == self.source
        self._listed = self._listed_by(earlier) if of_the_same or outputs.overwrite else {}
        self._before = {name: self._state(name) for name in (*self.names, self.record_name)}
        own = {**self._listed, **({self.record_name: self._before[self.record_name]} if of_the_same else {})}
        self._refuse_others(own)

    def _listed_by(self, record: dict[str, Any]) -> dict[str, str]:
        """Name -> SHA-256 of the files that a record lists, those alone that lie beside it."""
        files, prefix = record.get("files"), printable(self.stem)
        listed = {}
        for name, digest in files.items() if isinstance(files, dict) else ():
            if name.startswith(prefix) and Path(name).name == name:
                listed[self.stem + name.removeprefix(prefix)] = digest
        return listed

    def _state(self, name: str) -> str | None:
        try:
            return state_of(self.outputs.directory / name)
        except OSError as error:
            raise OSError(f"{self._place}: expected to write {printable(name)}, got: {error.strerror}") from error

    def _refuse_others(self, own: dict[str, Any]) -> None:
        directories = [name for name, state in self._before.items() if state == "directory"]
        if directories:
            raise IsADirectoryError(
                f"{self._place}: expected to write the file {printable(directories[0])}, got a directory there"
            )
        inputs = [name for name in self._before if _identity(self.outputs.directory / name) in self.outputs.keep]
        if inputs:
            raise FileExistsError(
                f"{self._place}: expected another folder, got one where {printable(inputs[0])} is itself an input"
            )
        if self.outputs.overwrite:
            return
        taken = [name for name, state in self._before.items() if state is not None and own.get(name) != state]
        if taken:
            raise FileExistsError(
                f"{self._place}: expected free names, or unchanged results of the same {self.what}, got "
                f"{', '.join(map(printable, taken))} (--overwrite replaces them)"
            )

    @property
    def _place(self) -> str:
        return f"--out {printable(self.outputs.directory)}"

    def stage(self, name: str) -> Path:
        """Path to write the file ``name`` to, for now."""
        if name not in self.names:
            raise KeyError(f"{name} was not claimed")
        return self.outputs.staging / name

    def picture(self, name: str, picture: Image.Image) -> None:
        """Stage a picture as PNG."""
        path = self.stage(name)
        with self._named(name):
            picture.save(path, format="PNG")

    def text(self, name: str, text: str) -> None:
        """Stage a text, in UTF-8."""
        path = self.stage(name)
        with self._named(name):
            path.write_bytes(text.encode())

    @contextlib.contextmanager
    def _named(self, name: str) -> Any:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"{self._place}: expected to write {printable(name)}, got: {reason}") from error

    def publish(self, record: dict[str, Any], indent: int = 2) -> None:
        """Move the staged files to their place, with the record, all of them or none.

        The record gets ``source``, ``files`` and its own digest. Files of earlier results of the same that this set
        does not have are removed, unless they have changed since.

        Raises:
            ValueError: the record does not go into JSON.
            OSError: a file cannot be moved, or another has appeared or changed in its place; then all is as before.
        """
        staging = self.outputs.staging
        digests = {name: str(state_of(staging / name)) for name in self.names}
        files = {printable(name): digest for name, digest in digests.items()}
        record = sealed({**record, "source": self.source, "files": files})
        text = json.dumps(record, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"
        with self._named(self.record_name):
            (staging / self.record_name).write_bytes(text.encode())
            digests[self.record_name] = str(state_of(staging / self.record_name))
        with signals_deferred():
            self._move()
            self.outputs.published = True
            self._before = dict(digests)

    def _move(self) -> None:
        directory, staging = self.outputs.directory, self.outputs.staging
        backups = staging / "before"
        backups.mkdir(exist_ok=True)
        moved: list[tuple[Path, Path | None]] = []
        stale = [name for name in self._listed if name not in self._before]
        try:
            for name in (*self.names, self.record_name):
                with self._named(name):
                    backup = self._set_aside(name, backups)
                    if backup is None:
                        _place_new(staging / name, directory / name)
                        moved.append((directory / name, None))
                    else:
                        moved.append((directory / name, backup))
                        os.replace(staging / name, directory / name)
            for name in stale:
                if self._state(name) == self._listed[name]:
                    moved.append((directory / name, backups / name))
                    os.replace(directory / name, backups / name)
                    self.removed.append(name)
        except BaseException:
            for target, backup in reversed(moved):
                with contextlib.suppress(OSError):
                    os.replace(backup, target) if backup is not None else target.unlink()
            raise

    def _set_aside(self, name: str, backups: Path) -> Path | None:
        """Keep what is to be replaced for the case that the rest fails; None where there is nothing.

        Raises:
            OSError: what is there now is not what was there before the work.
        """
        target, backup = self.outputs.directory / name, backups / name
        now = self._state(name)
        if now is None:
            return None
        if now == "directory" or (now != self._before[name] and not self.outputs.overwrite):
            raise FileExistsError("another file has come there meanwhile")
        backup.unlink(missing_ok=True)
        try:
            os.link(target, backup, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(target, backup, follow_symlinks=False)
        return backup


def _place_new(staged: Path, target: Path) -> None:
    """Move a file to where none is; FileExistsError where one has come meanwhile."""
    try:
        os.link(staged, target)
        staged.unlink()
    except FileExistsError as error:
        raise FileExistsError("another file has come there meanwhile") from error
    except OSError:  # a file system without hard links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(staged, target)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
