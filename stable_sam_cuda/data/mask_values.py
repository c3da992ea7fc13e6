"""The values of a mask file, one for each pixel.

- Grey of 1 to 32 bits and whole floats: as they are (2 and 4 bits come as multiples of 85 and 17). RGB of equal bands
  is grey; JPEG may differ a little. More colours than that name no object and are refused.
- A palette of greys with black among them: the greys, since it is a compressed grey picture. Any other palette: the
  indices, whatever their colours.
- Negative: -1, -9999 and the least values of 16 and 32 bits stand for no value, so they are background, which is told.
- Transparency: where all that is visible has one colour, opacity is the mask, and one object, cut midway between the
  lowest and the highest. So it is where what is visible has more than 256 colours, a picture cut out, and most of it
  is fully opaque or fully transparent, which is told. Else what is less than half as opaque as the most opaque pixel
  is background, whatever colour hides there. Opacity that is the same everywhere says nothing.
- The turn of EXIF is applied, and of several pages or frames the first is read, as for photographs.

What the values mean, stands in `stable_sam_cuda.data.masks`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stable_sam_cuda.data.picture_file import PictureError, Stored, read_stored
from stable_sam_cuda.notes import printable

CUT_OUT = "the mask file is a picture cut out by transparency; its opaque part is read as one object"
NEGATIVE = "negative values that usually stand for no value, such as -1, are read as background"
NO_VALUES = (-1, -9999, -(1 << 15), -(1 << 31))
MANY_COLOURS = 256
EXACT = 1 << 53  # floats hold whole numbers up to here


class MaskValues(NamedTuple):
    """The values (H, W) of a mask file, whole numbers.

    Args:
        one_object: the file holds one object, in shades, whatever its set means.
        by_opacity: the object is what is opaque.
        reasons: what was decided or lost, for `note`.
    """

    values: np.ndarray
    one_object: bool
    by_opacity: bool
    reasons: list[str]


def read_values(path: Path) -> MaskValues:
    """The values of a mask file, by the rule above.

    Raises:
        FileNotFoundError, ValueError, OSError: the file cannot be read, or holds colours or fractions.
    """
    stored = read_stored(path, "mask")
    pixels, opacity = stored.pixels, stored.opacity
    one_bit = isinstance(pixels, Image.Image) and pixels.mode == "1"
    if isinstance(pixels, Image.Image):
        if pixels.mode == "P":
            values = _of_palette(pixels, opacity)
        elif pixels.mode in ("1", "L"):
            values = np.asarray(pixels).astype(np.uint8)
        else:
            values = np.asarray(pixels.convert("RGB"))
    else:
        values = pixels
    by_opacity = False
    reasons = list(stored.reasons)
    varies = opacity is not None and opacity.min() != opacity.max()
    if opacity is not None and varies:
        visible = opacity > opacity.max() / 2
        if stored.premultiplied:
            values = _divided(values, opacity, visible)
        if _one_colour(values, opacity, visible):
            by_opacity = True
        elif _cut_out(values, opacity, visible):
            by_opacity = True
            reasons.append(CUT_OUT)
        if by_opacity:
            values = opacity - opacity.min()
        else:
            values = values * (visible if values.ndim == 2 else visible[..., None])
    if values.ndim == 3:
        values = _grey(path, values, stored, varies)
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise PictureError(f"mask {printable(path)}: expected whole numbers, got fractions, NaN or infinity")
        if max(-values.min(), values.max()) > EXACT:
            raise PictureError(f"mask {printable(path)}: expected whole numbers up to 2^53, got larger ones")
        values = values.astype(np.int64)
    if values.dtype.kind == "i" and values.min() < 0:
        no_value = np.isin(values, NO_VALUES)
        if no_value.any():
            values = np.where(no_value, 0, values).astype(values.dtype)
            reasons.append(NEGATIVE)
    return MaskValues(values, one_bit or by_opacity or stored.lossy, by_opacity, reasons)


def _of_palette(picture: Image.Image, opacity: np.ndarray | None) -> np.ndarray:
    """Indices (H, W) of a palette, or what they look like, where that is a grey picture or shown by opacity."""
    indices = np.asarray(picture)
    colours = np.array(picture.getpalette("RGB") or [], np.uint8)[:768].reshape(-1, 3)
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    seen = indices if opacity is None else indices[opacity > opacity.max() / 2]
    used = table[np.unique(seen)]
    grey = (colours == colours[:, :1]).all()
    if grey and (colours == 0).all(axis=1).any() and len(np.unique(used[:, 0])) == len(used):
        return table[indices, 0]
    if opacity is not None and opacity.min() != opacity.max() and len(np.unique(used, axis=0)) == 1:
        return table[indices]  # a brush of one colour: opacity is the mask
    return indices


def _divided(values: np.ndarray, opacity: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Colours that were multiplied by opacity, as they were where they are visible."""
    divided = values.copy()
    part = opacity[visible].astype(np.float64)
    most = np.iinfo(opacity.dtype).max
    part = part if values.ndim == 2 else part[:, None]
    divided[visible] = np.rint(values[visible] * (most / part)).clip(0, most)
    return divided


def _one_colour(values: np.ndarray, opacity: np.ndarray, visible: np.ndarray) -> bool:
    """Whether all that is visible has one colour; half transparent pixels may be off by what rounding leaves."""
    most = values[opacity == opacity.max()].astype(np.int64)
    if (most != most[:1]).any():
        return False
    return bool((abs(values[visible].astype(np.int64) - most[0]) <= 3).all())


def _cut_out(values: np.ndarray, opacity: np.ndarray, visible: np.ndarray) -> bool:
    """Whether a picture in colours shows through where it is opaque, and its opacity has hardly a value between."""
    if values.ndim == 2 or not (values[visible] != values[visible][:, :1]).any():
        return False
    if 2 * np.count_nonzero((opacity == opacity.min()) | (opacity == opacity.max())) <= opacity.size:
        return False
    red, green, blue = values[visible].astype(np.int64).T
    return len(np.unique(red << 32 | green << 16 | blue)) > MANY_COLOURS


def _grey(path: Path, values: np.ndarray, stored: Stored, opacity_varies: bool) -> np.ndarray:
    """The one value a pixel (H, W) of RGB (H, W, 3)."""
    if not (values != values[..., :1]).any():
        return values[..., 0]
    if stored.lossy:
        off = values.max(axis=2).astype(np.int16) - values.min(axis=2) > 32
        if off.mean() < 0.01:
            return np.rint(values.mean(axis=2)).astype(np.uint8)
    hint = "; if its opacity is the mask, save that as grey" if opacity_varies else ""
    raise PictureError(f"mask {printable(path)}: expected one value a pixel (grey or palette), got colours{hint}")
