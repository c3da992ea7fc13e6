"""Pictures and masks of every kind that data sets hold."""

import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.data.samples import MaskedImage, read_ids

IDS = np.zeros((20, 30), np.uint8)
IDS[2:8, 3:12], IDS[10:18, 5:25] = 1, 7


def saved(tmp_path, picture, name="mask.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def palette_mask():
    mask = Image.fromarray(IDS).convert("P")
    mask.putpalette([0, 0, 0, 200, 0, 0, *[60] * 15, 0, 200, 0])
    mask.frombytes(IDS.tobytes())
    return mask


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (Image.fromarray(IDS), "mask.png"),
        (palette_mask(), "mask.png"),
        (Image.fromarray(np.repeat(IDS[..., None], 3, 2)), "mask.png"),
        (Image.merge("RGBA", [Image.fromarray(IDS)] * 3 + [Image.new("L", (30, 20), 255)]), "mask.png"),
        (Image.merge("LA", [Image.fromarray(IDS), Image.new("L", (30, 20), 255)]), "mask.png"),
        (Image.fromarray(IDS.astype(np.uint16)), "mask.png"),
        (Image.fromarray(IDS.astype(np.int32)), "mask.tif"),
        (Image.fromarray(IDS.astype(np.float32)), "mask.tif"),
    ],
    ids=["grey", "palette", "rgb", "rgba", "grey-alpha", "16-bit", "32-bit", "whole-floats"],
)
def test_ids_are_read_from_masks_of_every_mode(mask, name, tmp_path):
    ids = read_ids(saved(tmp_path, mask, name))
    assert ids.dtype == np.uint8
    assert (ids == IDS).all()


def test_black_and_white_mask_of_one_bit_is_one_object(tmp_path):
    assert (read_ids(saved(tmp_path, Image.fromarray(IDS > 0))) == (IDS > 0)).all()


def test_ids_beyond_255_are_kept_apart(tmp_path):
    wide = IDS.astype(np.uint16) * 300
    ids = read_ids(saved(tmp_path, Image.fromarray(wide)))
    assert ids.dtype == np.uint16
    assert (ids == wide).all()


def test_hashed_ids_are_numbered_in_their_order(tmp_path):
    hashed = np.where(IDS == 1, 2_000_000_000, np.where(IDS == 7, -5, 0)).astype(np.int32)
    ids = read_ids(saved(tmp_path, Image.fromarray(hashed), "mask.tif"))
    assert (ids == np.where(IDS == 1, 2, np.where(IDS == 7, 1, 0))).all()


def soft_mask():
    return Image.fromarray((IDS == 7).astype(np.uint8) * 255).resize((120, 80), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", ["mask.png", "mask.jpg"])
def test_soft_edges_are_one_object_and_no_ids(name, tmp_path):
    ids = read_ids(saved(tmp_path, soft_mask(), name))
    expected = np.asarray(soft_mask()) > 127
    assert set(np.unique(ids)) == {0, 1}
    assert (ids == expected).mean() > 0.995


def test_ids_of_16_bits_may_be_any(tmp_path):
    many = np.arange(600, dtype=np.uint16).reshape(20, 30) % 256
    assert (read_ids(saved(tmp_path, Image.fromarray(many))) == many).all()


def test_void_of_255_beside_few_ids_stays_an_id(tmp_path):
    """Pascal VOC: 1 to 20 are objects, 255 the seam between them."""
    voc = IDS.copy()
    voc[9] = 255
    assert (read_ids(saved(tmp_path, Image.fromarray(voc))) == voc).all()


@pytest.mark.parametrize("brightest", [1, 255])
def test_binary_mask_is_cut_at_half_its_brightness(brightest, tmp_path):
    mask = np.where(IDS == 7, brightest, 0).astype(np.uint8)
    mask[0, 0] = brightest // 3
    assert (read_ids(saved(tmp_path, Image.fromarray(mask)), "binary") == (IDS == 7)).all()


def test_colours_and_fractions_name_no_object(tmp_path):
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[1, 1] = 1, 2, 3
    with pytest.raises(ValueError, match=r"mask .*expected one value a pixel .* got colours"):
        read_ids(saved(tmp_path, Image.fromarray(colours)))
    for value in (0.5, np.nan):
        with pytest.raises(ValueError, match="expected whole numbers"):
            read_ids(saved(tmp_path, Image.fromarray(np.full((4, 4), value, np.float32)), "mask.tif"))


def photograph(mode):
    """A picture (20, 30) in a mode, and what it shows as RGB."""
    ramp = np.arange(600).reshape(20, 30)
    if mode == "I;16":
        return Image.fromarray((ramp * 100).astype(np.uint16))
    picture = Image.fromarray(np.stack([ramp % 256, ramp // 3, 255 - ramp // 3], 2).astype(np.uint8))
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "a.png"), ("LA", "a.png"), ("P", "a.png"), ("RGBA", "a.png"), ("CMYK", "a.jpg"), ("I;16", "a.png")],
)
def test_pictures_of_every_mode_become_rgb(mode, name, tmp_path):
    image = saved(tmp_path, photograph(mode), name)
    picture, ids = MaskedImage("set/a", image, saved(tmp_path, Image.fromarray(IDS), "mask.png")).load()
    assert picture.shape == (20, 30, 3)
    assert picture.dtype == np.uint8
    assert picture.max() > 140
    assert ids.shape == (20, 30)


def test_exif_rotated_picture_stands_upright_beside_its_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    lying = photograph("RGB").transpose(Image.Transpose.ROTATE_90)
    image = saved(tmp_path, lying, "a.png", exif=exif)
    picture, ids = MaskedImage("set/a", image, saved(tmp_path, Image.fromarray(IDS))).load()
    assert picture.shape[:2] == ids.shape == (20, 30)
    assert (picture == np.asarray(photograph("RGB"))).all()


def test_object_of_one_pixel_is_an_object(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[19, 29] = 1
    assert read_ids(saved(tmp_path, Image.fromarray(mask))).sum() == 1
