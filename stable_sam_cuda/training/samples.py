"""One picture with the objects on it, read from a photograph and a mask beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from stable_sam_cuda.picture import open_picture, read_picture

MATTE_VALUES = (128, 254)  # grey values between an object's inside, 255, and its soft edge


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


def set_of(name: str) -> str:
    """``SET`` of a name ``SET/STEM``."""
    return name.rsplit("/", 1)[0]


@dataclass(frozen=True)
class MaskedImage:
    """One picture and its mask on disk.

    ``binary`` masks hold one object, in shades where its edge is soft, as HQSeg-44K's sets do; in other masks the
    value of a pixel is the id of its object, unless `read_ids` finds soft edges.
    """

    name: str
    image: Path
    mask: Path
    binary: bool = False

    @property
    def set_name(self) -> str:
        return set_of(self.name)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) RGB uint8 and object ids (H, W) uint8 or uint16.

        Raises:
            ValueError, OSError: a file is missing or cannot be read, or picture and mask differ in size.
        """
        image = np.asarray(read_picture(self.image))
        ids = read_ids(self.mask, self.binary)
        if image.shape[:2] != ids.shape:
            raise ValueError(f"{self.name}: picture has size {image.shape[:2]}, its mask {ids.shape}")
        return image, ids


def read_ids(path: Path, binary: bool = False) -> np.ndarray:
    """Object ids (H, W), uint8 or uint16, of a mask file.

    Grey values of 8, 16 or 32 bits, and the entries of a palette, are ids. But where the brightest of 8 bits is 255
    and others lie in `MATTE_VALUES`, the mask is one object with soft edges, as anti-aliasing and JPEG leave them. Of
    such a mask, and of a ``binary`` one, the object is what is brighter than half the brightest value.

    Raises:
        ValueError, OSError: the file cannot be read, or holds colours or fractions, which name no object.
    """
    values = _grey_values(path)
    found = np.unique(values)
    brightest = found[-1]
    low, high = MATTE_VALUES
    soft = values.dtype == np.uint8 and brightest == 255 and ((found >= low) & (found <= high)).any()
    if binary or soft:
        return (values > brightest / 2).astype(np.uint8)
    if found[0] < 0 or brightest > np.iinfo(np.uint16).max:
        if len(found) > np.iinfo(np.uint16).max:
            raise ValueError(f"mask {path}: expected at most 65535 objects, got {len(found)} different values")
        # Hashed ids of 32 bits: numbered in their order, background staying 0.
        used = found[found != 0]
        values, brightest = np.where(values == 0, 0, np.searchsorted(used, values) + 1), len(used)
    return values.astype(np.uint8 if brightest <= np.iinfo(np.uint8).max else np.uint16)


def _grey_values(path: Path) -> np.ndarray:
    """The values (H, W) of a mask file that has one value a pixel, whatever its mode."""
    values = np.asarray(open_picture(path, "mask"))
    if values.ndim == 3:
        colours = values[..., : 3 if values.shape[2] >= 3 else 1]
        if (colours != colours[..., :1]).any():
            raise ValueError(f"mask {path}: expected one value a pixel (grey or palette), got colours")
        values = colours[..., 0]
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise ValueError(f"mask {path}: expected whole numbers, got fractions, NaN or infinity")
        values = values.astype(np.int64)
    return values.astype(np.uint8) if values.dtype == bool else values
