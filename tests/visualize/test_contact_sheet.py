"""Every tile is on the sheet, at its place, with its masks."""

import numpy as np
import pytest

from stable_sam_cuda.visualize.contact_sheet import Tile, contact_sheet


def test_each_picture_is_at_its_place_whatever_its_shape():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    shapes = [(40, 90), (90, 40), (10, 10), (300, 300), (50, 50)]
    tiles = [
        Tile(np.full((*shape, 3), colour, np.uint8), caption="x" * 99)
        for shape, colour in zip(shapes, colours, strict=True)
    ]
    sheet = np.asarray(contact_sheet(tiles, columns=3, side=60)).astype(int)
    places = []
    for colour, (height, width) in zip(colours, shapes, strict=True):
        rows, columns = np.nonzero((np.abs(sheet - colour) < 20).all(2))
        scale = 60 / max(height, width)
        assert np.ptp(rows) + 1 == pytest.approx(height * scale, abs=1)
        assert np.ptp(columns) + 1 == pytest.approx(width * scale, abs=1)
        places.append((int(rows.mean() // (sheet.shape[0] / 2)), int(columns.mean() // (sheet.shape[1] / 3))))
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_masks_are_drawn_where_they_are():
    mask = np.zeros((50, 50), bool)
    mask[10:40, 10:40] = True
    image = np.full((50, 50, 3), 128, np.uint8)
    plain, masked = (np.asarray(contact_sheet([Tile(image, masks)], side=50)) for masks in ((), (mask,)))
    rows, columns = np.nonzero((plain != masked).any(2))
    assert 25 <= np.ptp(rows) <= 45
    assert 25 <= np.ptp(columns) <= 45


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="tiles: expected at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns, side: expected at least 1"):
        contact_sheet([Tile(np.zeros((5, 5, 3), np.uint8))], columns=0)
