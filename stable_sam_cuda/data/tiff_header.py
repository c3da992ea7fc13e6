"""What the first page of a TIFF declares, read without its pixels."""

import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from stable_sam_cuda.notes import printable

ORIENTATION = 0x0112  # tag of EXIF and of TIFF

# What decoders raise on truncated or inconsistent data, tried by changing bytes of files.
DAMAGE = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    cv2.error,
)


class TiffFacts(NamedTuple):
    """What the first page of a TIFF declares."""

    size: tuple[int, int]
    bands: int
    bits: int
    floats: bool
    signed: bool
    white_is_zero: bool
    extra: tuple[int, ...]
    by_band: bool
    tile_pixels: int
    orientation: int
    several: bool


def forget_orientation(content: np.ndarray) -> None:
    """Set the orientation of a TIFF in memory to 1: releases of OpenCV differ in what they do with it."""
    memory = content.data
    head = bytes(memory[:4])
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or head[2:] not in (struct.pack(order + "H", 42), struct.pack(order + "H", 43)):
        return
    big = head[2:] == struct.pack(order + "H", 43)
    place = struct.unpack_from(order + ("Q" if big else "I"), memory, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), memory, place)[0]
    place, length = place + (8 if big else 2), 20 if big else 12
    for entry in range(place, place + min(count, 4096) * length, length):
        if struct.unpack_from(order + "H", memory, entry)[0] == ORIENTATION:
            struct.pack_into(order + "H", memory, entry + (12 if big else 8), 1)


def tiff_facts(picture: Image.Image) -> TiffFacts | None:
    """What an opened TIFF declares; None of other formats. It must be asked before the pixels are loaded."""
    return _facts(picture.tag_v2) if isinstance(picture, TiffImagePlugin.TiffImageFile) else None


def _facts(tags: Any) -> TiffFacts:
    def several(tag: int, default: int) -> tuple[int, ...]:
        value = tags.get(tag, default)
        return tuple(value) if isinstance(value, tuple) else (value,)

    turned_by = tags.get(ORIENTATION, 1)
    return TiffFacts(
        size=(int(tags[256]), int(tags[257])),
        bands=int(tags.get(277, 1)),
        bits=max(several(258, 1)),
        floats=3 in several(339, 1),
        signed=2 in several(339, 1),
        white_is_zero=tags.get(262, 1) == 0,
        extra=several(338, 0) if 338 in tags else (),
        by_band=tags.get(284, 1) == 2,
        tile_pixels=int(tags.get(322, 0)) * int(tags.get(323, 0)),
        orientation=int(turned_by) if turned_by in range(1, 9) else 1,
        several=bool(tags.next),
    )


def facts_of_file(path: Path) -> TiffFacts | None:
    """What a file declares that Pillow does not take for a picture, if it is a TIFF."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return None
            tags = TiffImagePlugin.ImageFileDirectory_v2(head + (file.read(8) if b"+" in head[:4] else b""))
            file.seek(tags.next)
            tags.load(file)
        return _facts(tags)
    except DAMAGE:
        return None


def unusable(path: Path, facts: TiffFacts) -> str:
    """What a TIFF is refused for, and what to do."""
    kind = f"{facts.bits}-bit {'floats' if facts.floats else 'signed numbers' if facts.signed else 'numbers'}"
    stored = ", zero being white" * facts.white_is_zero + ", band after band" * facts.by_band
    name = printable(path.name)
    if facts.bands < 3:
        advice = f"write one band as unsigned grey, for example by gdal_translate -b 1 -ot UInt16 {name!r} grey.tif"
    else:
        advice = (
            "write three of its bands as RGB, pixel after pixel, for example by "
            f"gdal_translate -b 1 -b 2 -b 3 -co INTERLEAVE=PIXEL {name!r} rgb.tif"
        )
    return (
        "expected a TIFF of one band, or of RGB with or without transparency, of 8 or 16 bits or of floats, "
        f"got one of {facts.bands} bands of {kind}{stored}; {advice}"
    )
