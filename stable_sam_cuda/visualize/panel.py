"""Pictures side by side under their titles: SAM beside Stable-SAM, one row a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stable_sam_cuda.visualize.overlay import colour_of, draw_box, draw_mask, draw_points

PAPER = (250, 250, 248)
INK = (32, 32, 36)
QUIET_INK = (112, 112, 120)


@dataclass(frozen=True)
class Panel:
    """One picture of a comparison: the masks of all objects, the prompts they came from, two lines of text.

    ``masks[i]`` is (H, W) bool. ``boxes`` (x0, y0, x1, y1) and ``points`` (x, y) are in pixels of the picture.
    """

    title: str
    caption: str = ""
    masks: Sequence[np.ndarray] = ()
    boxes: Sequence[Sequence[float]] = ()
    points: Sequence[Sequence[float]] = ()
    labels: Sequence[int] = field(default=())


def scale_to(picture: Image.Image, smallest: int, largest: int) -> tuple[Image.Image, float]:
    """Picture scaled so that its longer side lies in [smallest, largest], and the factor."""
    longer = max(picture.size)
    factor = min(max(longer, smallest), largest) / longer
    if factor == 1:
        return picture, 1.0
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS), factor


def draw_panel(picture: Image.Image, panel: Panel, factor: float) -> Image.Image:
    """The picture, already scaled by ``factor``, with the panel's masks and then its prompts on it."""
    drawn = picture
    for index, mask in enumerate(panel.masks):
        drawn = draw_mask(drawn, mask, colour_of(index))
    for box in panel.boxes:
        drawn = draw_box(drawn, [value * factor for value in box])
    points = [[value * factor for value in point] for point in panel.points]
    return draw_points(drawn, points, panel.labels)


def fitting_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or as much of it as fits into ``width`` pixels, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def compare(
    picture: Image.Image, rows: Sequence[Sequence[Panel]], *, smallest: int = 560, largest: int = 1200
) -> Image.Image:
    """One image of all panels: a grid of ``rows``, every cell the same photograph.

    Args:
        picture: RGB photograph.
        rows: lists of panels, all of the same length.
        smallest, largest: bounds of the longer side of a cell, in pixels; the photograph is scaled into them.

    Raises:
        ValueError: no panel, or rows of different lengths.
    """
    columns = {len(row) for row in rows}
    if len(columns) != 1 or columns == {0}:
        raise ValueError(f"rows must hold the same number of panels each, at least one; got {[len(r) for r in rows]}")
    (column_count,) = columns
    scaled, factor = scale_to(picture.convert("RGB"), smallest, largest)
    unit = max(14, round(max(scaled.size) / 36))
    title_font, caption_font = ImageFont.load_default(unit), ImageFont.load_default(round(unit * 0.72))
    margin, header = unit, round(unit * 2.5)

    cell_width, cell_height = scaled.width + margin, scaled.height + header + margin // 2
    sheet = Image.new("RGB", (cell_width * column_count + margin, cell_height * len(rows) + margin // 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row_index, row in enumerate(rows):
        for column_index, panel in enumerate(row):
            left, top = margin + column_index * cell_width, margin // 2 + row_index * cell_height
            title = fitting_text(panel.title, title_font, scaled.width)
            caption = fitting_text(panel.caption, caption_font, scaled.width)
            draw.text((left, top), title, fill=INK, font=title_font)
            draw.text((left, top + round(unit * 1.3)), caption, fill=QUIET_INK, font=caption_font)
            sheet.paste(draw_panel(scaled, panel, factor), (left, top + header))
    return sheet
