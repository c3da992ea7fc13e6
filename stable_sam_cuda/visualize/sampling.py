"""Where the plugin looks: sampling points p + Δp drawn on the photograph (figure 5 of the paper)."""

import numpy as np
from PIL import Image, ImageDraw

from stable_sam_cuda.visualize.overlay import Colour

ARROW: Colour = (86, 180, 233)
POINT: Colour = (213, 94, 0)


def sampling_points(offsets: np.ndarray, max_offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Undisplaced and displaced locations of every cell of the feature map.

    Args:
        offsets: raw offsets of one prompt, (2, H, W), channel 0 = x, before tanh.
        max_offset: s_p, in cells.

    Returns:
        p and clamp(p + s_p tanh(raw)), each (H, W, 2) as (x, y) in cells, centres on integers.

    Raises:
        ValueError: offsets is not (2, H, W).
    """
    if offsets.ndim != 3 or offsets.shape[0] != 2:
        raise ValueError(f"offsets must have shape (2, H, W), got {offsets.shape}")
    _, height, width = offsets.shape
    rows, columns = np.mgrid[:height, :width]
    start = np.stack([columns, rows], axis=-1).astype(np.float64)
    moved = start + max_offset * np.tanh(np.moveaxis(offsets.astype(np.float64), 0, -1))
    return start, moved.clip(0, (width - 1, height - 1))


def draw_sampling_points(
    picture: Image.Image, offsets: np.ndarray, max_offset: float, mask: np.ndarray | None = None, *, step: int = 2
) -> Image.Image:
    """Picture with a line from each cell to where it is sampled, and a dot there.

    SAM scales the longer side of the photograph to its input and pads the shorter one, so one cell of an
    S x S feature map covers ``longer side / S`` pixels in both directions.

    Args:
        picture: RGB photograph.
        offsets: (2, S, S) raw offsets.
        max_offset: s_p, in cells.
        mask: (H, W) bool of the photograph's size; only cells whose centre is inside are drawn.
        step: draw every ``step``-th cell in each direction.
    """
    start, moved = sampling_points(offsets, max_offset)
    cell = max(picture.size) / max(offsets.shape[1:])
    drawn = picture.convert("RGB").copy()
    draw = ImageDraw.Draw(drawn)
    radius, line_width = max(1.5, cell / 5), max(1, round(cell / 8))
    for row in range(0, offsets.shape[1], step):
        for column in range(0, offsets.shape[2], step):
            x0, y0 = (start[row, column] + 0.5) * cell
            x1, y1 = (moved[row, column] + 0.5) * cell
            if x0 >= picture.width or y0 >= picture.height:
                continue
            if mask is not None and not mask[int(y0), int(x0)]:
                continue
            draw.line((x0, y0, x1, y1), fill=ARROW, width=line_width)
            draw.ellipse((x1 - radius, y1 - radius, x1 + radius, y1 + radius), fill=POINT)
    return drawn
