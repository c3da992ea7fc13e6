"""What a picture file holds: pixels in full depth, opacity apart from them, the right way up.

Pillow identifies and unpacks every file first, so that damage is refused by one reader. OpenCV reads again what Pillow
would cut to 8 bits: colours of 16 bits, and TIFFs of floats that Pillow does not know. How the pixels of a photograph
become RGB stands in `stable_sam_cuda.data.picture`, what those of a mask mean in `stable_sam_cuda.data.masks`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from stable_sam_cuda.data.picture_depth import as_meant, is_deep, read_by_opencv, white_of
from stable_sam_cuda.data.tiff_header import (
    DAMAGE,
    ORIENTATION,
    TiffFacts,
    facts_of_file,
    tiff_facts,
    unusable,
)
from stable_sam_cuda.notes import printable

# Far above any camera; a file that declares more is refused before its pixels are unpacked.
MAX_PIXELS = 100_000_000

# SAM scales the longer side to its input size; beyond this ratio the shorter side would be a few pixels.
MAX_ASPECT_RATIO = 100

# Vector and container formats that start other programs, or that Pillow only has stubs for.
REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS", "ICNS"}
PILLOWS_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_OF_SEVERAL = "the file holds several frames or pages; only the first is read"
CUT_TO_8_BITS = "colours of 16 bits are cut to their upper 8 bits; save as 16-bit PNG or TIFF in RGB to keep them"
NO_EXIF = "the EXIF data cannot be read, so the picture is not turned"
NO_OPACITY = "the fourth band is not transparency, as far as the file says and as it looks; it is not used"
BANDS_IGNORED = "bands beyond colour and transparency are not used"


class PictureError(ValueError):
    """A file that is refused, in words for its owner."""


class Stored(NamedTuple):
    """The pixels of a file, the right way up.

    Args:
        pixels: a Pillow picture without opacity where no band has more than 8 bits; else an array, (H, W) of grey
            or (H, W, 3) of RGB.
        opacity: (H, W), 0 being transparent; uint8 beside a Pillow picture, else of the type of ``pixels``.
        premultiplied: colours are multiplied by opacity.
        format: Pillow's name of the file's format.
        lossy: values near each other may have been the same before.
        orientation: EXIF orientation, 1 to 8, that the pixels were turned by.
        reasons: what was decided or lost, for `note`.
    """

    pixels: Image.Image | np.ndarray
    opacity: np.ndarray | None
    premultiplied: bool
    format: str
    lossy: bool
    orientation: int
    reasons: list[str]


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array (H, W, ...) turned as EXIF ``orientation`` (1 to 8) says: sides change places from 5 on."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def check_size(path: Path, size: tuple[int, int], what: str = "photo") -> None:
    """Refuse a picture too large to unpack or too thin to segment.

    Raises:
        ValueError: naming the limit and the size.
    """
    width, height = size
    name = f"{what} {printable(path)}"
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,} = {width * height:,}"
        )
    if width < 1 or height < 1 or max(size) > MAX_ASPECT_RATIO * min(size):
        raise PictureError(f"{name}: expected sides of a ratio up to {MAX_ASPECT_RATIO}:1, got {width} x {height}")


def stored_size(path: Path, what: str = "photo") -> tuple[int, int]:
    """Width and height of a picture file as stored, before its orientation is applied.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_stored`.
    """
    return _header(path, what)[0]


def orientation(path: Path, what: str = "photo") -> int:
    """EXIF orientation of a picture file, 1 to 8; 1 where it has none or a senseless one.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_stored`.
    """
    return _header(path, what)[1]


def _header(path: Path, what: str) -> tuple[tuple[int, int], int]:
    try:
        with _opened(path, what) as picture:
            facts = tiff_facts(picture)
            return (facts.size, facts.orientation) if facts else (picture.size, _exif_orientation(picture)[0])
    except _UnknownTiffError as unknown:
        return unknown.facts.size, unknown.facts.orientation


def read_stored(path: Path, what: str = "photo") -> Stored:
    """The pixels of a picture file.

    Args:
        what: the picture's role, for the messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture, is damaged, too large or too thin, or of bands that have no meaning.
        OSError: the file cannot be read.
    """
    try:
        with _opened(path, what) as picture:
            return _read_opened(path, picture, what)
    except _UnknownTiffError as unknown:
        with _decoding(path, what):
            return _read_unknown_tiff(path, unknown.facts, what)


def as_stored(picture: Image.Image) -> Stored:
    """The pixels of a Pillow picture in memory, not turned."""
    pixels, opacity = _apart(picture)
    kept = np.asarray(pixels) if pixels.mode.startswith(("I", "F")) else pixels
    return Stored(kept, opacity, picture.mode in ("La", "RGBa"), picture.format or "", False, 1, [])


class _UnknownTiffError(Exception):
    def __init__(self, facts: TiffFacts) -> None:
        super().__init__()
        self.facts = facts


@contextmanager
def _decoding(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one error that names the file."""
    name = f"{what} {printable(path)}"
    try:
        yield
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got far more ({error})") from error
    except UnidentifiedImageError as error:
        facts = facts_of_file(path)
        if facts is not None:
            raise _UnknownTiffError(facts) from error
        raise PictureError(
            f"{name}: expected a picture (PNG, JPEG, TIFF, WebP, ...), got another kind of file"
        ) from error
    except PermissionError as error:
        raise OSError(f"{name}: expected a readable file, got: permission denied") from error
    except MemoryError as error:
        raise PictureError(f"{name}: expected a picture that fits into memory, got none left") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(f"{name}: expected a readable file, got: {error.strerror}") from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PictureError(f"{name}: expected an undamaged picture, got: {reason}") from error


@contextmanager
def _opened(path: Path, what: str) -> Iterator[ImageFile.ImageFile]:
    """The file as Pillow opens it, its size checked, its pixels not yet unpacked."""
    name = f"{what} {printable(path)}"
    if path.is_dir():
        raise PictureError(f"{name}: expected a picture file, got a directory")
    if not path.exists():
        raise FileNotFoundError(f"{name}: expected a picture file, got a path where no file is")
    if not path.is_file():
        raise PictureError(f"{name}: expected a picture file, got a pipe or a device")
    # Between Pillow's limit of 89 million pixels and ours Pillow warns, once. To silence it would change the filters
    # of warnings for all threads.
    # Pillow gets no path: it would map the file, die where another program cuts it short, and forget the turn of TIFFs.
    with _decoding(path, what), open(path, "rb") as file, Image.open(file, formats=_formats()) as picture:
        facts = tiff_facts(picture)
        check_size(path, facts.size if facts else picture.size, what)
        if facts and facts.tile_pixels > MAX_PIXELS:
            raise PictureError(f"{name}: expected tiles of at most {MAX_PIXELS:,} pixels, got {facts.tile_pixels:,}")
        yield picture


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in REFUSED_FORMATS)


def _exif_orientation(picture: Image.Image) -> tuple[int, list[str]]:
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except DAMAGE:
        return 1, [NO_EXIF]
    return (int(value) if value in range(1, 9) else 1), []


def _read_opened(path: Path, picture: ImageFile.ImageFile, what: str) -> Stored:
    form, size, deep = picture.format or "", picture.size, is_deep(picture)
    key, facts, reasons = picture.info.get("transparency"), tiff_facts(picture), []
    if facts:
        deep = facts.bits > 8 and picture.mode in ("RGB", "RGBA", "CMYK")
        if deep and facts.by_band:
            raise PictureError(f"{what} {printable(path)}: {unusable(path, facts)}")
        size = facts.size
        reasons += [FIRST_OF_SEVERAL] if facts.several else []
        reasons += [BANDS_IGNORED] if facts.bands > 4 or (0 in facts.extra and picture.mode != "RGBA") else []
        _keep_premultiplied(picture)
    picture.load()
    turned_by, more = (facts.orientation, []) if facts else _exif_orientation(picture)
    pixels: Image.Image | np.ndarray
    if deep and form in ("PNG", "TIFF", "PPM", "JPEG2000") and picture.mode in ("RGB", "RGBA", "L"):
        is_grey = picture.mode == "L" or (form == "PNG" and _first_bytes(path, 26)[25:] == b"\x04")
        several = _shows_several(picture, form)
        picture.im = Image.core.new("1", (1, 1))  # Pillow found no damage; its 8 bits need not stay in memory
        pixels, opacity = read_by_opencv(path, size)
        if opacity is None and isinstance(key, tuple):
            opacity = np.where((pixels != key).any(axis=2), 65535, 0).astype(np.uint16)
        pixels = turn(pixels[..., 0] if is_grey and pixels.ndim == 3 else pixels, turned_by)
        opacity = None if opacity is None else turn(opacity, turned_by)
    else:
        pixels, opacity = _apart(picture)
        if form != "TIFF" and turned_by in PILLOWS_TURNS:  # TIFFs are turned by Pillow
            pixels = pixels.transpose(PILLOWS_TURNS[turned_by])
            opacity = None if opacity is None else turn(opacity, turned_by)
        reasons += [CUT_TO_8_BITS] if deep else []
        if pixels.mode.startswith(("I", "F")):
            pixels = np.asarray(pixels)
        if facts:
            pixels = as_meant(pixels, facts, reasons)
        several = _shows_several(picture, form)
    reasons += [*more, *([FIRST_OF_SEVERAL] if several else [])]
    if facts and opacity is not None and not (facts.extra[:1] in ((1,), (2,)) and _looks_like_opacity(opacity)):
        opacity = None
        reasons += [] if BANDS_IGNORED in reasons else [NO_OPACITY]
    premultiplied = opacity is not None and facts is not None and facts.extra[0] == 1
    lossy = form in ("JPEG", "MPO", "AVIF") or (form == "WEBP" and b"VP8 " in _first_bytes(path, 64))
    return Stored(pixels, opacity, premultiplied, form, lossy, turned_by, reasons)


def _looks_like_opacity(band: np.ndarray) -> bool:
    """Whether most of a band is fully opaque or fully transparent, and some of it opaque."""
    opaque = 255 if band.dtype == np.uint8 else white_of(band)
    count = int(np.count_nonzero(band == opaque))
    return count > 0 and 2 * (count + int(np.count_nonzero(band == 0))) > band.size


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _keep_premultiplied(picture: ImageFile.ImageFile) -> None:
    """Have Pillow unpack a TIFF's bands as they are: it would divide by opacity, which may be another band."""

    def plain(args: Any) -> Any:
        rawmode, *rest = args
        return (rawmode.replace("RGBa", "RGBA").replace("a", "A"), *rest)

    if picture.mode == "RGBA":
        picture.tile = [tile._replace(args=plain(tile.args)) for tile in picture.tile]


def _apart(picture: Image.Image) -> tuple[Image.Image, np.ndarray | None]:
    """A copy of the picture without its opacity, and the opacity (H, W)."""
    if picture.mode == "RGBX":
        picture = picture.convert("RGB")
    if picture.mode == "PA":
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "LA"):
        return picture.convert("RGB" if picture.mode == "RGBA" else "L"), np.asarray(picture.getchannel("A"))
    if picture.mode in ("RGBa", "La"):  # as multiplied: to convert would divide
        *bands, opacity_band = picture.split()
        return (Image.merge("RGB", bands) if len(bands) == 3 else bands[0]), np.asarray(opacity_band)
    key = picture.info.get("transparency")
    opacity = None
    if picture.mode == "P" and key is not None:
        table = np.full(256, 255, np.uint8)
        if isinstance(key, bytes):
            table[: len(key)] = np.frombuffer(key[:256], np.uint8)
        elif isinstance(key, int) and 0 <= key < 256:
            table[key] = 0
        opacity = table[np.asarray(picture)]
    elif picture.mode in ("1", "L") and isinstance(key, int):
        opacity = np.where(np.asarray(picture.convert("L")) == key, 0, 255).astype(np.uint8)
    elif picture.mode.startswith("I") and isinstance(key, int):
        opacity = np.where(np.asarray(picture) == key, 0, 65535).astype(np.uint16)
    elif picture.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        opacity = np.where((np.asarray(picture) == key).all(axis=2), 0, 255).astype(np.uint8)
    apart = picture.copy()
    apart.info.pop("transparency", None)  # it would be converted a second time, with a warning
    return apart, opacity


def _shows_several(picture: Image.Image, form: str) -> bool:
    """Whether an animation has more than one frame; asked last, since the answer may move to another frame."""
    if form not in ("GIF", "WEBP", "PNG", "AVIF"):  # the further pictures of an MPO are previews and gain maps
        return False
    try:
        return bool(getattr(picture, "is_animated", False))
    except DAMAGE:
        return False


def _read_unknown_tiff(path: Path, facts: TiffFacts, what: str) -> Stored:
    """A TIFF that Pillow does not know: floats, read by OpenCV; others are refused."""
    check_size(path, facts.size, what)
    usable = facts.floats and facts.bits in (32, 64) and facts.bands in (1, 3, 4) and not facts.by_band
    usable = usable or (facts.bands == 1 and facts.bits == 16 and not facts.floats and not facts.signed)
    if not usable or facts.tile_pixels > MAX_PIXELS:
        raise PictureError(f"{what} {printable(path)}: {unusable(path, facts)}")
    values, _ = read_by_opencv(path, facts.size)
    reasons = [BANDS_IGNORED] * (facts.bands == 4) + [FIRST_OF_SEVERAL] * facts.several
    values = np.asarray(as_meant(values, facts, reasons))
    turned = turn(values, facts.orientation)
    return Stored(turned, None, False, "TIFF", False, facts.orientation, reasons)
