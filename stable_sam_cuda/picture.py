"""Photographs from files: every mode Pillow knows, as 8-bit RGB, the right way up."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Far above any camera; a file that declares more is refused before its pixels are unpacked.
MAX_PIXELS = 100_000_000

# SAM scales the longer side to its input size; beyond this ratio the shorter side would be a few pixels.
MAX_ASPECT_RATIO = 100


def check_size(path: Path, size: tuple[int, int], what: str = "photo") -> None:
    """Refuse a picture too large to unpack or too thin to segment.

    Raises:
        ValueError: naming the limit and the size.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} {path}: expected at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,} = {width * height:,}"
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(f"{what} {path}: expected sides of a ratio up to {MAX_ASPECT_RATIO}:1, got {width} x {height}")


def stretch_to_8_bits(path: Path, values: np.ndarray) -> Image.Image:
    """Grey picture of any number type as 8 bits, its own darkest value black and its brightest white.

    Instruments fill 10, 12 or 14 of 16 bits, and floats have no fixed range; so the range is the picture's own.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"photo {path}: expected finite pixel values, got NaN or infinity")
    low, high = values.min(), values.max()
    if high == low:
        return Image.new("L", values.shape[::-1])
    return Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8))


def to_rgb(path: Path, picture: Image.Image) -> Image.Image:
    """RGB picture of any Pillow mode; transparent parts are laid on white, as a viewer shows them."""
    if picture.mode.startswith(("I", "F")):
        picture = stretch_to_8_bits(path, np.asarray(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def open_picture(path: Path, what: str = "photo") -> Image.Image:
    """The picture in a file, in its own mode, turned as its EXIF orientation says; the first frame of several.

    Args:
        what: the picture's role, for the messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture, is damaged, too large or too thin.
        OSError: the file cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{what} {path}: expected a picture file, got a path where no file is")
    if path.is_dir():
        raise ValueError(f"{what} {path}: expected a picture file, got a directory")
    try:
        with warnings.catch_warnings():
            # check_size refuses at a limit of its own; Pillow's warning about its lower one says nothing more.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                check_size(path, picture.size, what)
                picture.load()
                return ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} {path}: expected at most {MAX_PIXELS:,} pixels, got far more ({error})") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{what} {path}: expected a picture (PNG, JPEG, TIFF, WebP, ...), got another kind of file"
        ) from error
    except PermissionError as error:
        raise OSError(f"{what} {path}: expected a readable file, got: permission denied") from error
    except (OSError, SyntaxError, EOFError) as error:
        # Pillow's decoders raise any of these on truncated or inconsistent data.
        raise ValueError(f"{what} {path}: expected an undamaged picture, got: {error}") from error


def read_picture(path: Path) -> Image.Image:
    """The photograph in a file as 8-bit RGB, the right way up.

    Raises:
        FileNotFoundError, ValueError, OSError: as `open_picture`; or a pixel is NaN or infinite.
    """
    return to_rgb(path, open_picture(path))
