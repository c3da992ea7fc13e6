"""Masks, prompts and sampling points land where they belong, and the rest of the photograph stays as it is."""

import numpy as np
import pytest
import torch
from PIL import Image

from stable_sam_cuda import visualize
from stable_sam_cuda.functional import deformable_sample
from stable_sam_cuda.visualize.overlay import BACKGROUND_COLOUR, BOX_COLOUR, FOREGROUND_COLOUR


def grey(width: int = 300, height: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def disc(width: int = 300, height: int = 200) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (columns - 150) ** 2 + (rows - 100) ** 2 < 60**2


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before) != np.asarray(after)).any(-1)


def test_mask_is_filled_and_outlined() -> None:
    drawn = visualize.draw_mask(grey(), disc(), (255, 0, 0), opacity=0.5)
    pixels = np.asarray(drawn, dtype=int)
    assert np.abs(pixels[100, 150] - (191, 64, 64)).max() <= 2, "half the colour inside"
    assert np.abs(pixels[100, 150 + 59] - (255, 0, 0)).max() <= 40, "the colour itself on the border"
    distance = np.hypot(*(np.mgrid[:200, :300] - np.array([100, 150])[:, None, None]))
    assert not changed(grey(), drawn)[distance > 70].any(), "nothing changes far outside"


def test_mask_is_scaled_to_the_picture() -> None:
    drawn = visualize.draw_mask(grey(600, 400), disc(), (255, 0, 0))
    assert changed(grey(600, 400), drawn)[200, 300]


def test_empty_mask_draws_nothing() -> None:
    assert not changed(grey(), visualize.draw_mask(grey(), np.zeros((200, 300), bool), (255, 0, 0))).any()


def test_mask_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must have shape \(H, W\), got \(1, 200, 300\)"):
        visualize.draw_mask(grey(), disc()[None], (255, 0, 0))


def test_box_and_points() -> None:
    drawn = visualize.draw_box(grey(), (50, 40, 250, 160))
    assert drawn.getpixel((150, 40)) == BOX_COLOUR
    assert drawn.getpixel((150, 100)) == (128, 128, 128)
    drawn = visualize.draw_points(grey(900, 600), [(60, 60), (200, 120)], [1, 0])
    assert drawn.getpixel((64, 56)) == FOREGROUND_COLOUR
    assert drawn.getpixel((204, 116)) == BACKGROUND_COLOUR


def test_box_beyond_the_picture_can_be_drawn() -> None:
    assert visualize.draw_box(grey(), (-50, -40, 400, 300)).size == (300, 200)


def test_comparison_is_a_grid() -> None:
    one = visualize.compare(grey(), [[visualize.Panel("SAM")]])
    four = visualize.compare(grey(), [[visualize.Panel("SAM", "a caption " * 30, [disc()])] * 2] * 2)
    assert four.width > 1.8 * one.width
    assert four.height > 1.8 * one.height
    with pytest.raises(ValueError, match="same number of panels"):
        visualize.compare(grey(), [[visualize.Panel("a")], []])
    with pytest.raises(ValueError, match="at least one"):
        visualize.compare(grey(), [])


@pytest.mark.parametrize("size", [(4000, 100), (30, 30), (2500, 2500)])
def test_cells_have_a_sensible_size(size: tuple[int, int]) -> None:
    sheet = visualize.compare(grey(*size), [[visualize.Panel("SAM")]])
    assert 560 <= max(sheet.size) <= 1400


def test_sampling_points_are_those_of_the_op() -> None:
    """Sampling a map of coordinates at the offsets gives the coordinates that are drawn."""
    offsets = torch.randn(1, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    coordinates = torch.stack([columns, rows])[None].double()
    expected = deformable_sample(coordinates, offsets, max_offset=3.0, backend="reference")[0].movedim(0, -1)
    start, moved = visualize.sampling_points(offsets[0].numpy(), 3.0)
    assert np.allclose(moved, expected.numpy())
    assert np.array_equal(start, coordinates[0].movedim(0, -1).numpy())


def test_sampling_points_are_drawn_inside_the_mask_only() -> None:
    drawn = visualize.draw_sampling_points(grey(), np.zeros((2, 64, 64)), 4.0, disc())
    assert changed(grey(), drawn)[60:140, 110:190].any()
    assert not changed(grey(), drawn)[:, :60].any()
    with pytest.raises(ValueError, match="offsets must have shape"):
        visualize.sampling_points(np.zeros((64, 64)), 4.0)
