"""Pixels that Pillow would cut to their upper 8 bits, or misread: which files have them, and what they are."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageFile

from stable_sam_cuda.data.tiff_header import TiffFacts, forget_orientation

# OpenCV reads from memory: more than `MAX_PIXELS` of 16 bits need.
MAX_DEEP_BYTES = 1 << 30

WHITE_IS_ZERO = "the file says that zero is white (WhiteIsZero), so its values are inverted"


def is_deep(picture: ImageFile.ImageFile) -> bool:
    """Whether Pillow would cut the colours of an opened picture to 8 bits."""
    if picture.mode.startswith(("I", "F")) or not picture.tile:
        return False
    codec, args = picture.tile[0][0], picture.tile[0][3]
    if picture.format == "JPEG2000":
        # Behind the start of the codestream lies the size marker, with the first component's bits.
        start = getattr(picture, "fp")  # noqa: B009
        place = start.tell()
        start.seek(0)
        head = start.read(4096)
        start.seek(place)
        begin = head.find(b"\xff\x4f\xff\x51")
        return begin >= 0 and len(head) > begin + 42 and (head[begin + 42] & 0x7F) + 1 > 14
    if picture.format == "PPM":
        # Pillow scales by the maximum that the file declares; below 15 bits that is what it holds.
        declared = args[-1] if isinstance(args, tuple) else 0
        return codec.startswith("ppm") and isinstance(declared, int) and declared > (1 << 14) - 1
    return ";16" in str(args) or codec == "SGI16"


def white_without_outliers(values: np.ndarray) -> int:
    """What white is among colours of 16 bits, as `white_of`; one pixel, or 0.01 % of the values, may be brighter.

    Hot pixels of a sensor would else leave a picture of 12 bits all but black.
    """
    allowed = max(3, values.size // 10_000)
    brightest = white_of(values)
    return next(
        (
            (1 << bits) - 1
            for bits in (8, 10, 12, 14)
            if brightest >> bits and int(np.count_nonzero(values >> bits)) <= allowed
        ),
        brightest,
    )


def white_of(values: np.ndarray) -> int:
    """What white is among numbers of 16 bits: the most that 8, 10, 12, 14 or 16 bits hold, as the brightest needs."""
    brightest = int(values.max())
    return next((1 << bits) - 1 for bits in (8, 10, 12, 14, 16) if brightest < 1 << bits)


_lock = threading.Lock()
_readers, _level_before = 0, 0


@contextmanager
def _opencv_silent() -> Iterator[None]:
    """Keep OpenCV from logging every tag of a TIFF that it does not know; what it cannot read is told by its result.

    The level is the whole process's: the first of several threads lowers it, the last one restores it.
    """
    global _readers, _level_before
    with _lock:
        if not _readers:
            _level_before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                cv2.utils.logging.setLogLevel(_level_before)


def read_by_opencv(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (H, W) or (H, W, 3) RGB in full depth, not turned, and the fourth band where there is one.

    Raises:
        ValueError, cv2.error: the file is too large, or OpenCV cannot read it.
    """
    if path.stat().st_size > MAX_DEEP_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than {MAX_DEEP_BYTES:,} for 16 bits or floats")
    content = np.fromfile(path, np.uint8)
    forget_orientation(content)
    with _opencv_silent():
        values = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if values is None or values.shape[:2] != size[::-1] or values.dtype.kind not in "uf":
        raise ValueError("colours of 16 bits or floats that OpenCV cannot read")
    if values.ndim == 2 or values.shape[2] == 1:
        return values.reshape(values.shape[:2]), None
    return values[..., 2::-1], (values[..., 3] if values.shape[2] == 4 else None)


def as_meant(pixels: Image.Image | np.ndarray, facts: TiffFacts, reasons: list[str]) -> Image.Image | np.ndarray:
    """The values of a TIFF of one band, by its sign and its white: Pillow heeds them in fewer bits, or not at all.

    ``reasons`` gets what was decided.
    """
    if facts.bands != 1 or (isinstance(pixels, Image.Image) and not (facts.signed and pixels.mode == "L")):
        return pixels
    values = np.asarray(pixels)
    if values.dtype == np.uint8:
        return values.view(np.int8).astype(np.int16)
    if values.dtype == np.int32 and facts.bits == 32 and not facts.signed and values.min() < 0:
        values = values.view(np.uint32)
    if facts.white_is_zero:
        reasons.append(WHITE_IS_ZERO)
        if facts.floats or facts.signed:  # no number is the brightest, so that the range stays as it is
            return values.min() + (values.max() - values)
        return ((1 << facts.bits) - 1 - values.astype(np.int64)).astype(values.dtype)
    return values
