"""One picture with the objects on it, read from a photograph and a mask beside it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from stable_sam_cuda.data import picture
from stable_sam_cuda.data.masks import RULE as MASK_RULE
from stable_sam_cuda.data.masks import MaskSet, read_ids
from stable_sam_cuda.notes import note

__all__ = ["MaskSet", "MaskedImage", "Sample", "digest_of_file", "read_ids", "set_of"]

TURNED = "the mask fits the picture as stored, so it is turned along with it, as the picture's EXIF data say"
AMBIGUOUS = (
    "EXIF data turn the picture, and its mask is taken as drawn on the turned one; if it was drawn on the picture as "
    "stored, save the picture without its EXIF orientation"
)


class Sample(Protocol):
    """A picture with objects, by name; loaded whenever it is needed, always with the same result."""

    @property
    def name(self) -> str:
        """``SET/STEM``, unique in a data set."""

    @property
    def set_name(self) -> str:
        """The set that the picture belongs to."""

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) RGB uint8 and object ids (H, W) uint8 or uint16, 0 being background.

        Raises:
            ValueError, OSError: picture or objects cannot be read, or do not fit each other.
        """

    def picture_digest(self) -> str:
        """SHA-256, in hexadecimal digits, of everything that decides on the picture that `load` returns.

        Raises:
            OSError: a file cannot be read.
        """

    def digest(self) -> str:
        """SHA-256, in hexadecimal digits, of everything that decides on the picture and the objects.

        Raises:
            ValueError, OSError: a file cannot be read.
        """


def set_of(name: str) -> str:
    """``SET`` of a name ``SET/STEM``."""
    return name.rsplit("/", 1)[0]


def digest_of_file(path: Path, *rules: str) -> str:
    """SHA-256, in hexadecimal digits, of the rules that a file is read by, and of its bytes.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256("".join(f"{rule}\0" for rule in rules).encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class MaskedImage:
    """One picture and its mask on disk; ``masks`` is the set that says what masks mean, None for this one alone."""

    name: str
    image: Path
    mask: Path
    masks: MaskSet | None = None

    def __post_init__(self) -> None:
        if self.masks is None:
            object.__setattr__(self, "masks", MaskSet([self.mask]))

    @property
    def set_name(self) -> str:
        return set_of(self.name)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) RGB uint8 and object ids (H, W) uint8 or uint16.

        A mask of the size that the picture has on disk is turned along with it. Where sizes cannot tell whether a mask
        was drawn on the picture as stored or as turned, it is taken as drawn on the turned one, and that is noted.

        Raises:
            ValueError, OSError: a file is missing or cannot be read, or picture and mask differ in size.
        """
        image = np.asarray(picture.read_picture(self.image))
        ids = self._set.read(self.mask)
        if image.shape[:2] != ids.shape:
            width, height = picture.stored_size(self.image)
            turned = picture.turn(ids, picture.orientation(self.image))
            if ids.shape != (height, width) or turned.shape != image.shape[:2]:
                raise ValueError(f"{self.name}: picture has size {image.shape[:2]}, its mask {ids.shape}")
            note(TURNED, self.mask)
            ids = np.ascontiguousarray(turned)
        elif self._may_be_of_the_stored():
            note(AMBIGUOUS, self.mask)
        return image, ids

    def _may_be_of_the_stored(self) -> bool:
        """Whether a mask that fits the turned picture, and has no turn of its own, fits the stored one as well."""
        tag = picture.orientation(self.image)
        if tag == 1 or picture.orientation(self.mask, "mask") != 1:
            return False
        width, height = picture.stored_size(self.image)
        return tag < 5 or width == height

    def picture_digest(self) -> str:
        """SHA-256 of the picture's bytes and of the rule that it is read by.

        Raises:
            OSError: the file cannot be read.
        """
        return digest_of_file(self.image, picture.RULE)

    def digest(self) -> str:
        """SHA-256 of the picture's digest, the mask's bytes, and of what masks of its set mean.

        Raises:
            OSError: a file cannot be read.
        """
        return digest_of_file(self.mask, self.picture_digest(), MASK_RULE, self._set.rule)

    @property
    def _set(self) -> MaskSet:
        assert self.masks is not None  # set by __post_init__
        return self.masks
