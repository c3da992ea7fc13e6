"""Photographs as the verbs that segment take them."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from stable_sam_cuda.cli.ownership import file_digest
from stable_sam_cuda.data.picture import read_picture
from stable_sam_cuda.notes import printable


def check_photos(photos: Sequence[Path]) -> None:
    """Refuse what is no file, and a file that is named twice, before anything is read.

    Raises:
        ValueError, OSError: naming the photograph.
    """
    for place, photo in enumerate(photos):
        name = printable(photo)
        if name == "-":
            raise ValueError("photo -: expected a picture file, got the standard input, which is not read (a file of "
                             "this name is ./-)")  # fmt: skip
        if photo.is_dir():
            raise ValueError(f"photo {name}: expected a picture file, got a directory")
        if not photo.exists():
            raise FileNotFoundError(f"photo {name}: expected a picture file, got a path where no file is")
        if not photo.is_file():
            raise ValueError(f"photo {name}: expected a picture file, got a pipe or a device")
        if photo in photos[:place]:
            raise ValueError(f"photo {name}: expected each photograph once, got it twice")


def read_photo(photo: Path, digest: str | None = None) -> Image.Image:
    """The photograph as 8-bit RGB, the right way up.

    Args:
        digest: SHA-256 that its bytes had.

    Raises:
        ValueError, OSError: as `read_picture`, or the file has changed.
    """
    if digest is not None and file_digest(photo) != digest:
        raise ValueError(f"photo {printable(photo)}: expected a file that stays as it is, got one that has changed")
    return read_picture(photo)


def room_for(picture: Image.Image) -> int:
    """Bytes that the results of a photograph take on the disk, at least."""
    return picture.width * picture.height // 4 + 2**14
