"""Masks for tests, drawn and written to files."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

from stable_sam_cuda.notes import DataWarning


def grid(count: int, height: int = 10, width: int = 14, gap: int = 3) -> np.ndarray:
    """So many rectangles with the ids 1, 2, ..., twenty in a row."""
    rows = -(-count // 20)
    ids = np.arange(1, rows * 20 + 1).reshape(rows, 20)
    tile = np.pad(np.ones((height, width), int), ((gap, 0), (gap, 0)))
    ids = np.kron(np.where(ids <= count, ids, 0), tile)
    return np.pad(ids, 2).astype(np.uint8 if count < 256 else np.uint16)


def disc(radius: float = 30, size: int = 100, centre: tuple[float, float] = (48, 52)) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2).astype(np.float32)


def soft(white: int = 255, blur: float = 2.0, dtype: type = np.uint8, scale: int = 1, **options: float) -> np.ndarray:
    return (np.rint(cv2.GaussianBlur(disc(**options), (0, 0), blur) * white) * scale).astype(dtype)


def written(path: Path, picture: np.ndarray | Image.Image, **options: object) -> Path:
    if path.suffix in (".tif", ".tiff") and isinstance(picture, np.ndarray):
        tifffile.imwrite(path, picture, **options)
    else:
        (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path, **options)
    return path


def written_set(folder: Path, masks: list[np.ndarray], suffix: str = ".png") -> list[Path]:
    return [written(folder / f"{index:03}{suffix}", mask) for index, mask in enumerate(masks)]


def told_by(call) -> tuple[object, list[DataWarning]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [one.message for one in caught if isinstance(one.message, DataWarning)]


def palette(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    picture = Image.new("P", indices.shape[::-1])
    picture.putpalette([value for colour in colours for value in colour])
    picture.frombytes(indices.astype(np.uint8).tobytes())
    return picture


TWO = np.zeros((60, 80), np.uint8)


TWO[5:25, 5:30], TWO[35:55, 40:75] = 1, 2


ONE = (TWO == 2).astype(np.uint8)


BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def with_alpha(colour: np.ndarray, alpha: np.ndarray) -> Image.Image:
    bands = [*np.broadcast_to(colour, (3, *alpha.shape)), alpha]
    return Image.fromarray(np.dstack(bands).astype(np.uint8))


def bordered(ids: np.ndarray, void: int) -> np.ndarray:
    """The ids with a border of ``void`` of two pixels around each object."""
    edge = cv2.dilate((ids > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    return np.where(edge & (ids == 0), void, ids)
