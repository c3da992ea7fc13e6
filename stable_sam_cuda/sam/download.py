"""Meta's SAM checkpoints: found in a local folder, or downloaded into it once."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from stable_sam_cuda.files import atomic_write
from stable_sam_cuda.progress import ProgressLines, on_terminal

BASE_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
HOME_VARIABLE = "STABLE_SAM_HOME"
TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint as Meta publishes it. The six digits in its name are the beginning of an MD5, not of the SHA-256."""

    file_name: str
    size: int
    sha256: str


REMOTE_CHECKPOINTS = {
    "vit_b": RemoteCheckpoint(
        "sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": RemoteCheckpoint(
        "sam_vit_l_0b3195.pth", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": RemoteCheckpoint(
        "sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
}


def checkpoint_folder() -> Path:
    """Where checkpoints are kept: ``$STABLE_SAM_HOME``, or ``~/.cache/stable_sam_cuda``.

    Raises:
        FileNotFoundError: neither is known, as in a container that runs with a user number of its own.
    """
    if chosen := os.environ.get(HOME_VARIABLE):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "stable_sam_cuda"
    except RuntimeError as error:
        raise FileNotFoundError(
            f"checkpoint: expected a folder for downloaded weights, got none, since this user has no home directory; "
            f"set {HOME_VARIABLE} to a folder, or give a local file as checkpoint"
        ) from error


def find_or_download(model_name: str) -> Path:
    """The local file of Meta's checkpoint for ``vit_b``, ``vit_l`` or ``vit_h``, downloaded where it is not there yet.

    A download is checked by size and SHA-256 and appears whole or not at all; a file found is checked by its size.

    Raises:
        ConnectionError: the file is not there and cannot be downloaded (no internet, connection cut).
        OSError: as `checkpoint_folder`, or the folder cannot be written.
        ValueError: what was found or downloaded is not Meta's file.
    """
    remote = REMOTE_CHECKPOINTS[model_name]
    path = checkpoint_folder() / remote.file_name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(remote, path)
    elif path.stat().st_size != remote.size:
        raise ValueError(
            f"checkpoint: expected {remote.size} bytes of Meta's {model_name}, got {path.stat().st_size} in {path} "
            "(delete the file to download it anew)"
        )
    return path


def _download(remote: RemoteCheckpoint, path: Path) -> None:
    url = BASE_URL + remote.file_name
    digest, received = hashlib.sha256(), 0
    with atomic_write(path) as file:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, _progress(remote) as advance:
                while received <= remote.size and (chunk := response.read(CHUNK_BYTES)):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    advance(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"checkpoint: {path} is not there and {url} could not be downloaded ({error}). "
                f"Give a local file as checkpoint, or copy it to {path.parent} ({HOME_VARIABLE} sets the folder)"
            ) from error
        if received < remote.size:
            raise ConnectionError(
                f"checkpoint: the download of {url} was cut after {received} of {remote.size} bytes; try again"
            )
        if received > remote.size or digest.hexdigest() != remote.sha256:
            raise ValueError(
                f"checkpoint: expected {url} to be {remote.size} bytes of SHA-256 {remote.sha256}, "
                f"got {received} bytes of SHA-256 {digest.hexdigest()}; nothing was kept"
            )


@contextmanager
def _progress(remote: RemoteCheckpoint) -> Iterator[Callable[[int], None]]:
    """Takes the bytes as they come; a bar on a terminal, else a line at the beginning and now and then."""
    if not on_terminal():
        lines = ProgressLines(shown=lambda count: f"{count / 2**20:,.0f} MiB")
        lines.begin(remote.file_name, remote.size)
        lines.write()
        yield lines.advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task(remote.file_name, total=remote.size)
        yield lambda count: bars.advance(task, count)
