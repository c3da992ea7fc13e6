"""The values of a mask file: palettes, transparency, depth, damage."""

import cv2
import numpy as np
import pytest
from mask_drawings import BLACK, ONE, TWO, WHITE, bordered, disc, grid, palette, soft, told_by, with_alpha, written
from PIL import Image

from stable_sam_cuda.data.masks import MaskSet, read_ids


@pytest.mark.parametrize("white", [255, 250, 200, 90])
@pytest.mark.parametrize("quality", [30, 75, 98])
@pytest.mark.parametrize("kind", ["jpeg", "colour-jpeg", "saved-again-as-png"])
def test_jpeg_is_one_object(tmp_path, white, quality, kind):
    drawn = disc()
    picture = Image.fromarray((drawn * white).astype(np.uint8))
    path = written(tmp_path / "mask.jpg", picture.convert("RGB") if kind == "colour-jpeg" else picture, quality=quality)
    if kind == "saved-again-as-png":
        path = written(tmp_path / "mask.png", Image.open(path))
    ids = read_ids(path)
    assert set(np.unique(ids)) == {0, 1}
    assert (ids == drawn).mean() > 0.995


def test_jpeg_with_slight_colours_is_grey_and_a_photograph_is_refused(tmp_path):
    tinted = np.dstack([(disc() * 240 + shift).astype(np.uint8) for shift in (0, 4, 8)])
    assert (read_ids(written(tmp_path / "tinted.jpg", tinted)) == disc()).mean() > 0.99
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="got colours"):
        read_ids(written(tmp_path / "photo.jpg", colours))


NOISE = np.random.default_rng(0).integers(0, 256, (3, 60, 80))


BRUSH = np.array([200, 30, 90])[:, None, None]


OPAQUE = np.full_like(TWO, 255)


@pytest.mark.parametrize(
    ("picture", "expected", "options"),
    [
        (palette(1 - ONE, [WHITE, BLACK]), ONE, {}),
        (palette(ONE, [BLACK, WHITE]), ONE, {}),
        (palette(TWO, [BLACK, (200, 0, 0), (0, 200, 0)]), TWO, {}),
        (palette(TWO, [(n, n, n) for n in range(256)]), TWO, {}),
        (palette(np.full_like(TWO, 0), [WHITE, BLACK]), np.ones_like(TWO), {}),
        (palette(TWO, [WHITE, (200, 0, 0), (0, 200, 0)]), TWO, {"transparency": 0}),
        (palette(ONE, [WHITE, BLACK]), ONE, {"transparency": 0}),
        (palette(ONE, [WHITE, WHITE]), ONE, {"transparency": bytes([0, 255])}),
        (with_alpha(255, ONE * 255), ONE, {}),
        (with_alpha(0, ONE * 255), ONE, {}),
        (with_alpha(BRUSH, ONE * 255), ONE, {}),
        (with_alpha(BRUSH, ONE * 120), ONE, {}),
        (with_alpha(np.where(ONE, BRUSH, NOISE), ONE * 255), ONE, {}),
        (with_alpha(TWO, OPAQUE), TWO, {}),
        (with_alpha(TWO, OPAQUE * 0), TWO, {}),
        (with_alpha(np.where(TWO > 0, TWO, NOISE), (TWO > 0) * 255), TWO, {}),
        (Image.merge("LA", [Image.new("L", (80, 60), 255), Image.fromarray(ONE * 255)]), ONE, {}),
        (Image.merge("LA", [Image.new("L", (80, 60), 0), Image.fromarray(ONE * 255)]), ONE, {}),
        (Image.fromarray(TWO), np.where(TWO == 1, 0, TWO) > 0, {"transparency": 1}),
        (Image.fromarray(ONE * 255).convert("1"), ONE, {}),
    ],
    ids=[
        "palette-white-first",
        "palette-black-first",
        "palette-of-colours",
        "palette-identity",
        "palette-white-everywhere",
        "palette-transparent-white",
        "palette-transparent-white-black-object",
        "palette-one-colour-alphas",
        "alpha-on-white",
        "alpha-on-black",
        "alpha-of-a-brush",
        "alpha-of-a-half-transparent-brush",
        "alpha-of-a-brush-over-hidden-noise",
        "alpha-opaque",
        "alpha-zero-everywhere",
        "ids-over-hidden-noise",
        "grey-alpha-white",
        "grey-alpha-black",
        "grey-with-a-transparent-value",
        "one-bit",
    ],
)
def test_palettes_and_transparency(tmp_path, picture, expected, options):
    ids = read_ids(written(tmp_path / "mask.png", picture, **options))
    if expected.max() > 1:
        assert (ids == expected).all()
    else:
        assert ((ids > 0) == (expected > 0)).all()
        assert len(np.unique(ids)) <= 2


@pytest.mark.parametrize("premultiplied", [False, True])
@pytest.mark.parametrize("white", [255, 90])
def test_alpha_of_soft_brushes_is_cut_at_half(tmp_path, white, premultiplied):
    alpha = soft(white)
    colour = np.full((3, 100, 100), 220.0) * (alpha / 255 if premultiplied else 1)
    path = written(
        tmp_path / "mask.tif",
        np.dstack([*colour, alpha]).astype(np.uint8),
        photometric="rgb",
        extrasamples=["assocalpha" if premultiplied else "unassalpha"],
    )
    if white == 255:  # else nothing is opaque, and of a TIFF the band is data
        assert (read_ids(path) == (alpha > white / 2)).all()
    png = written(tmp_path / "mask.png", np.dstack([np.full((100, 100, 3), 220, np.uint8), alpha]))
    assert (read_ids(png) == (alpha > white / 2)).all()


def test_opaque_colours_are_refused(tmp_path):
    colours = np.where(TWO == 1, BRUSH, np.where(TWO == 2, BRUSH[::-1], 0))
    for picture in (with_alpha(colours, OPAQUE), with_alpha(colours, (TWO > 0) * 255)):
        with pytest.raises(ValueError, match=r"mask\.png: expected one value a pixel .* got colours"):
            read_ids(written(tmp_path / "mask.png", picture))


@pytest.mark.parametrize("bits", [2, 4])
def test_greys_of_few_bits(tmp_path, bits):
    path = tmp_path / "mask.png"
    assert cv2.imwrite(str(path), TWO)
    Image.fromarray(TWO).save(path, bits=bits)
    ids = read_ids(path)
    assert [int(one) for one in np.unique(ids)] == [0, 1, 2] or len(np.unique(ids)) == 3


def test_16_bit_ids_in_three_equal_bands(tmp_path):
    wide = TWO.astype(np.uint16) * 300
    assert (read_ids(written(tmp_path / "mask.tif", np.dstack([wide] * 3), photometric="rgb")) == wide).all()


def test_pages_turns_and_broken_files(tmp_path):
    pages = tmp_path / "pages.tif"
    Image.fromarray(TWO).save(pages, save_all=True, append_images=[Image.fromarray(ONE)])
    ids, told = told_by(lambda: read_ids(pages))
    assert (ids == TWO).all()
    assert ["only the first" in one.reason for one in told] == [True]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (read_ids(written(tmp_path / "turned.png", TWO, exif=exif)) == np.rot90(TWO, -1)).all()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    masks = MaskSet([tmp_path / "broken.png", tmp_path / "turned.png"])
    assert masks.meaning == "instances"
    with pytest.raises(ValueError, match=r"mask .*broken\.png"):
        masks.read(tmp_path / "broken.png")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("value", [-1, "least"])
def test_negative_no_values_are_background(tmp_path, dtype, value):
    if value == "least":
        value = np.iinfo(dtype).min if dtype not in (np.int8, np.float32) else -9999 if dtype == np.float32 else -1
    path = written(tmp_path / "mask.tif", bordered(grid(3).astype(np.int64), value).astype(dtype))
    ids, told = told_by(lambda: read_ids(path))
    assert (ids == grid(3)).all()
    assert ["negative" in one.reason for one in told] == [True]


@pytest.mark.parametrize("outside", [1, 100, 127, 128, 200])
def test_alpha_is_cut_midway_between_its_lowest_and_highest(tmp_path, outside):
    path = written(tmp_path / "mask.png", with_alpha(BRUSH, np.where(ONE, 255, outside)))
    assert (read_ids(path) == ONE).all()


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 2)])
def test_masks_whose_zero_is_white_are_no_negatives(tmp_path, dtype, white):
    path = written(tmp_path / "mask.tif", (white - TWO.astype(np.float64)).astype(dtype), photometric="miniswhite")
    assert (read_ids(path) == TWO).all()


def test_ids_of_32_bits_beyond_31_are_kept_apart(tmp_path):
    mask = np.array([0, 3_000_000_000, 4_000_000_000], np.uint32)[TWO]
    assert (read_ids(written(tmp_path / "mask.tif", mask, photometric="minisblack")) == TWO).all()


@pytest.mark.parametrize("soft_edges", [False, True], ids=["hard", "soft"])
def test_a_picture_cut_out_is_the_mask_that_its_opacity_is(tmp_path, soft_edges):
    alpha = soft(255, blur=1) if soft_edges else (disc() * 255).astype(np.uint8)
    photo = np.random.default_rng(0).integers(0, 256, (3, *alpha.shape))
    ids, told = told_by(lambda: read_ids(written(tmp_path / "mask.png", with_alpha(photo, alpha))))
    assert (ids == (alpha > 127)).all()
    assert ["cut out by transparency" in one.reason for one in told] == [True]


def test_few_opaque_colours_are_refused_with_a_word_about_opacity(tmp_path):
    picture = with_alpha(np.where(TWO == 1, BRUSH, BRUSH[::-1]), (TWO > 0) * 255)
    with pytest.raises(ValueError, match="got colours; if its opacity is the mask, save that as grey"):
        read_ids(written(tmp_path / "mask.png", picture))
