"""Photographs from files as 8-bit RGB, the right way up, by one rule for every verb.

**Bits.** Bands of 8 bits are taken as they are. Colours of 16 bits are scaled by the bits in use: the least of 8, 10,
12, 14 and 16 that hold the picture's values, so that 4095 is white in a picture of 12 bits; black stays black. One
pixel, or 0.01 % of the values, may be brighter, as hot pixels are: it becomes white, and that is said. Grey of more
than 8 bits, of floats, and of signed numbers is stretched from its darkest value to its brightest, since instruments
use any range. Colours of floats are taken as 0 to 1 if they lie there, else stretched, all bands alike. Where a format
declares fewer bits (PPM, JPEG 2000), the declaration counts. A TIFF whose zero is white is inverted.

**Bands.** Opacity of PNG, WebP and GIF is what it says. The fourth band of a TIFF is opacity only if the file says so
(ExtraSamples 1 or 2) and it looks so: more than half of it fully opaque or fully transparent, and some opaque. Else
it is another band, such as near infrared, and not used. TIFFs of other numbers of bands are refused.

**Transparency** is laid on white, as a viewer shows it; a picture that is transparent everywhere is refused.

**Orientation.** The turn of EXIF or of the TIFF's tag is applied. **Frames:** the first one is read.

What a rule decides or loses is told by `stable_sam_cuda.notes.note`.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from stable_sam_cuda.data.picture_depth import white_of, white_without_outliers
from stable_sam_cuda.data.picture_file import (
    MAX_ASPECT_RATIO,
    MAX_PIXELS,
    PictureError,
    Stored,
    as_stored,
    check_size,
    orientation,
    read_stored,
    stored_size,
    turn,
)
from stable_sam_cuda.notes import note, printable

__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_PIXELS",
    "RULE",
    "check_size",
    "orientation",
    "read_picture",
    "stored_size",
    "to_rgb",
    "turn",
]

RULE = "picture 3"  # changes whenever the same file would be read differently: caches keep it

STRETCHED_GREY = "grey of more than 8 bits, or signed, is stretched: its darkest value is black, its brightest white"
STRETCHED_COLOUR = "colours of floats outside 0 to 1 are stretched: the least value is black, the greatest white"
CLIPPED = "hardly one value needs the upper bits of 16; what is brighter than white becomes white"
ROWS = 256  # unpacked to floats at once, so that a large picture does not need many times its size


def read_picture(path: Path) -> Image.Image:
    """The photograph in a file as 8-bit RGB, the right way up.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture, is damaged, too large, too thin, transparent everywhere or of bands
            that have no meaning; or a pixel is NaN or infinite.
        OSError: the file cannot be read.
    """
    return _shown(path, read_stored(path))


def to_rgb(path: Path, picture: Image.Image) -> Image.Image:
    """RGB of a Pillow picture of any mode, by the rules of `read_picture`; ``path`` names it in messages.

    Of a picture in memory nothing but Pillow's 8 bits is left where it had more, and its orientation is the caller's.

    Raises:
        ValueError: as `read_picture`.
    """
    return _shown(path, as_stored(picture))


def _shown(path: Path, stored: Stored) -> Image.Image:
    reasons = list(stored.reasons)
    if stored.opacity is not None and not stored.opacity.any():
        raise PictureError(
            f"photo {printable(path)}: expected something to see, got a picture that is transparent everywhere; "
            "if its colours are meant, save it without transparency"
        )
    if isinstance(stored.pixels, Image.Image):
        picture = stored.pixels
    else:
        picture = Image.fromarray(_to_8_bits(path, stored, reasons))
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    if stored.opacity is not None:
        picture = _on_white(picture, _opacity_of_8_bits(stored.opacity), stored.premultiplied)
    for reason in reasons:
        note(reason, path)
    return picture


def _on_white(picture: Image.Image, opacity: Image.Image, premultiplied: bool) -> Image.Image:
    if premultiplied:
        return ImageChops.add(picture, Image.merge("RGB", [ImageChops.invert(opacity)] * 3))
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=opacity)
    return white


def _opacity_of_8_bits(opacity: np.ndarray) -> Image.Image:
    if opacity.dtype != np.uint8:
        opacity = _scaled(opacity, 0, white_of(opacity))
    return Image.fromarray(np.ascontiguousarray(opacity))


def _to_8_bits(path: Path, stored: Stored, reasons: list[str]) -> np.ndarray:
    """Grey (H, W) or RGB (H, W, 3) of any number type as uint8; ``reasons`` gets what was decided."""
    values = np.asarray(stored.pixels)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise PictureError(f"photo {printable(path)}: expected finite pixel values, got NaN or infinity")
    if values.ndim == 3 and values.dtype.kind == "u":
        white = white_without_outliers(values)
        if white < white_of(values):
            reasons.append(CLIPPED)
        if white < np.iinfo(np.uint16).max:
            bits = white.bit_length()
            reasons.append(f"colours of 16 bits use only {bits} of them: {white} is taken for white")
        return _scaled(values, 0, white)
    # What is transparent is not seen, so its values do not count.
    seen = values if stored.opacity is None else values[stored.opacity > 0]
    low, high = seen.min().item(), seen.max().item()
    if values.ndim == 3:
        if low >= 0 and high <= 1:
            return _scaled(values, 0, 1)
        reasons.append(STRETCHED_COLOUR)
    else:
        reasons.append(STRETCHED_GREY)
    return _scaled(values, low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from ``low`` to ``high`` as 0 to 255; all 0 where there is no range between them."""
    scaled = np.zeros(values.shape, np.uint8)
    if high > low:
        for row in range(0, len(values), ROWS):
            part = values[row : row + ROWS].astype(np.float64)
            scaled[row : row + ROWS] = np.rint((part.clip(low, high) - low) * (255 / (high - low)))
    return scaled
