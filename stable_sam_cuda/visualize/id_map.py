"""A map of many objects drawn on a photograph."""

import colorsys

import numpy as np
from PIL import Image

# Steps of the golden ratio around the circle of hues: neighbours in number are far apart in colour, however many.
_HUE_STEP = 0.618034


def draw_id_map(picture: Image.Image, ids: np.ndarray, *, opacity: float = 0.55) -> Image.Image:
    """Photograph with a translucent colour over every object and a white line around it.

    Args:
        picture: RGB.
        ids: (H, W) integers, of the picture's size; 0 is no object.
        opacity: of the colours, 0 to 1.

    Raises:
        ValueError: the map is not of the picture's size.
    """
    if ids.shape != (picture.height, picture.width):
        raise ValueError(f"ids: expected shape {(picture.height, picture.width)}, the picture's, got {ids.shape}")
    hues = (np.arange(int(ids.max(initial=0)) + 1) * _HUE_STEP) % 1
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.75, 1.0) for hue in hues], dtype=np.float32) * 255
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    share = np.where(ids > 0, np.float32(opacity), np.float32(0))[..., None]
    drawn = pixels + share * (colours[ids] - pixels)
    border = np.zeros(ids.shape, dtype=bool)
    border[:-1] |= ids[:-1] != ids[1:]
    border[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    drawn[border] = 255
    return Image.fromarray(np.rint(drawn).astype(np.uint8))
