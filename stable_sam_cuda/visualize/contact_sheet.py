"""Many small pictures on one sheet: to see at a glance what a data set or a synthesis looks like."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from stable_sam_cuda.visualize.overlay import colour_of, draw_mask
from stable_sam_cuda.visualize.panel import INK, PAPER, fitting_text


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet, (H, W, 3) RGB uint8, with masks (H, W) bool drawn on it, and a line below it."""

    image: np.ndarray
    masks: Sequence[np.ndarray] = ()
    caption: str = ""


def contact_sheet(tiles: Sequence[Tile], columns: int = 6, side: int = 240) -> Image.Image:
    """The tiles in rows of ``columns``, each picture fitted into a square of ``side`` pixels.

    Raises:
        ValueError: there is no tile, or less than one column or pixel.
    """
    if not tiles:
        raise ValueError("tiles: expected at least one, got none")
    if columns < 1 or side < 1:
        raise ValueError(f"columns, side: expected at least 1, got {columns} and {side}")
    font = ImageFont.load_default(max(10, side // 18))
    margin, caption_height = max(4, side // 30), max(14, side // 12)
    cell = (side + margin, side + caption_height + margin)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        left, top = margin + index % columns * cell[0], margin + index // columns * cell[1]
        picture = ImageOps.contain(Image.fromarray(tile.image), (side, side))
        for number, mask in enumerate(tile.masks):
            picture = draw_mask(picture, mask, colour_of(number))
        sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
        draw.text((left, top + side + 2), fitting_text(tile.caption, font, side), fill=INK, font=font)
    return sheet
