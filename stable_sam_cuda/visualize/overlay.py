"""Masks and prompts drawn on a photograph, with Pillow alone."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

# Bright enough to show through a translucent fill on dark and on light photographs.
PALETTE: tuple[Colour, ...] = (
    (64, 156, 255),
    (255, 145, 77),
    (46, 196, 140),
    (240, 98, 146),
    (171, 130, 255),
    (0, 200, 220),
)

BOX_COLOUR: Colour = (255, 196, 0)
FOREGROUND_COLOUR: Colour = (46, 204, 64)
BACKGROUND_COLOUR: Colour = (255, 65, 54)
SHADOW: Colour = (20, 20, 20)


def colour_of(index: int) -> Colour:
    """Colour of the ``index``-th object; the palette repeats."""
    return PALETTE[index % len(PALETTE)]


def outline_alpha(mask: Image.Image, width: float) -> Image.Image:
    """Opacity of a smooth line of ``width`` pixels along the mask's border.

    A blurred step crosses 1/2 at the border, and its value tells the distance to it; so a band around
    1/2 is an antialiased line, whatever the shape of the border.
    """
    blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(width)), dtype=np.float32) / 255
    # A Gaussian-blurred step falls with slope 1 / (width * sqrt(2 pi)) at the border.
    distance = np.abs(blurred - 0.5) * width * np.sqrt(2 * np.pi)
    alpha = np.clip(width / 2 + 0.5 - distance, 0, 1)
    return Image.fromarray((alpha * 255).astype(np.uint8))


def draw_mask(picture: Image.Image, mask: np.ndarray, colour: Colour, *, opacity: float = 0.45) -> Image.Image:
    """Picture with a translucent fill and a solid outline over the mask.

    Args:
        picture: RGB, any size; the mask is scaled to it.
        mask: (H, W) bool.
        colour: RGB, 0 to 255.
        opacity: of the fill, 0 to 1.

    Raises:
        ValueError: the mask is not a (H, W) array.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape (H, W), got {mask.shape}")
    coverage = Image.fromarray(mask.astype(bool).astype(np.uint8) * 255)
    coverage = coverage.resize(picture.size, Image.Resampling.BILINEAR)
    line_width = max(2.0, max(picture.size) / 300)
    solid = Image.new("RGB", picture.size, colour)
    drawn = Image.composite(solid, picture, coverage.point(lambda value: round(value * opacity)))
    drawn.paste((255, 255, 255), mask=outline_alpha(coverage, line_width * 1.8).point(lambda value: round(value * 0.7)))
    drawn.paste(colour, mask=outline_alpha(coverage, line_width))
    return drawn


def draw_box(picture: Image.Image, box: Sequence[float], colour: Colour = BOX_COLOUR) -> Image.Image:
    """Picture with the box (x0, y0, x1, y1), in the picture's own pixels, as a line with a dark rim."""
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    line_width = max(2, round(max(picture.size) / 320))
    x0, y0, x1, y1 = box
    corners = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    rim = (corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1)
    draw.rectangle(rim, outline=SHADOW, width=line_width + 2)
    draw.rectangle(corners, outline=colour, width=line_width)
    return drawn


def draw_points(picture: Image.Image, points: Sequence[Sequence[float]], labels: Sequence[int]) -> Image.Image:
    """Picture with a disc at each point (x, y): green with a plus for label 1, red with a minus for 0."""
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    radius = max(5, round(max(picture.size) / 90))
    for (x, y), label in zip(points, labels, strict=True):
        fill = FOREGROUND_COLOUR if label else BACKGROUND_COLOUR
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=(255, 255, 255), width=2)
        arm, line_width = radius * 0.55, max(2, radius // 4)
        draw.line((x - arm, y, x + arm, y), fill=(255, 255, 255), width=line_width)
        if label:
            draw.line((x, y - arm, x, y + arm), fill=(255, 255, 255), width=line_width)
    return drawn
