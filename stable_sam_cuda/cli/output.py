"""Results on disk: all of them, or none."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from types import TracebackType

from PIL import Image


class Outputs:
    """Files of one run, staged in a hidden directory beside their place and moved there together at the end.

    A context manager: leaving it without an error publishes every staged file; with an error nothing appears,
    and a directory that was made for the run is removed again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []

    def __enter__(self) -> "Outputs":
        """Make the directory and prove that it can be written to.

        Raises:
            OSError: it cannot.
        """
        # mkdir(parents=True) does not say which parents were missing, and those must go again after a failure.
        candidates = (self.directory, *self.directory.parents)
        self._made = [path for path in candidates if not path.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._staging = tempfile.TemporaryDirectory(prefix=".stable-sam-", dir=self.directory)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"--out {self.directory}: expected a directory that can be written to, got: {reason}"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        published = False
        try:
            if kind is None:
                self._publish()
                published = True
        finally:
            self._staging.cleanup()
            if not published:
                with contextlib.suppress(OSError):  # somebody else has put a file there meanwhile
                    for path in self._made:
                        path.rmdir()

    def _publish(self) -> None:
        for name in self.names:
            if (self.directory / name).is_dir():
                raise OSError(f"--out {self.directory}: expected to write the file {name}, got a directory there")
        for name in self.names:
            os.replace(Path(self._staging.name) / name, self.directory / name)

    def stage(self, name: str) -> Path:
        """Path to write the file ``name`` to, for now."""
        self.names.append(name)
        return Path(self._staging.name) / name

    def picture(self, name: str, picture: Image.Image) -> None:
        picture.save(self.stage(name), format="PNG")

    def record(self, name: str, record: dict) -> None:
        text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
        self.stage(name).write_text(text + "\n", encoding="utf-8")
