"""Photographs of every kind come in as 8-bit RGB, the right way up; everything else is refused by name."""

import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from stable_sam_cuda.data.picture import MAX_PIXELS, orientation, read_picture, stored_size, turn
from stable_sam_cuda.notes import DataWarning


def gradient(width: int = 40, height: int = 30) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 6, rows * 8, 255 - columns * 6], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "YCbCr", "LAB", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(gradient()).convert(mode)
    path = tmp_path / "photo.tiff"
    source.save(path)
    picture = read_picture(path)
    assert picture.mode == "RGB"
    assert picture.size == (40, 30)
    expected = np.asarray(source.convert("RGB"), dtype=int)
    assert np.abs(np.asarray(picture, dtype=int) - expected).max() == 0


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64), (200, 40, 30)).convert("CMYK").save(path, quality=95)
    assert np.abs(np.asarray(read_picture(path), dtype=int) - (200, 40, 30)).max() < 12


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    pixels = np.dstack([np.full((8, 8, 3), 90, np.uint8), np.full((8, 8), 255, np.uint8)])
    pixels[:4, :, 3] = 0
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).convert(mode).save(path)
    read = np.asarray(read_picture(path))
    assert (read[:4] == 255).all()
    assert (np.abs(read[4:].astype(int) - 90) <= 1).all()


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    source = Image.new("P", (4, 4), 0)
    source.putpalette([10, 20, 30, 200, 100, 50])
    source.putpixel((0, 0), 1)
    path = tmp_path / "photo.png"
    source.save(path, transparency=0)
    read = np.asarray(read_picture(path))
    assert read[0, 0].tolist() == [200, 100, 50]
    assert (read[1:] == 255).all()


@pytest.mark.parametrize(
    ("dtype", "top"), [(np.uint16, 65535), (np.uint16, 4095), (np.int32, 100_000), (np.float32, 0.5)]
)
def test_deep_grey_is_stretched_to_its_own_range(tmp_path: Path, dtype: type, top: float) -> None:
    ramp = np.linspace(0, top, 256).astype(dtype).reshape(16, 16)
    path = tmp_path / "photo.tiff"
    Image.fromarray(ramp).save(path)
    read = np.asarray(read_picture(path))
    assert read.shape == (16, 16, 3)
    assert read[0, 0].tolist() == [0, 0, 0]
    assert read[-1, -1].tolist() == [255, 255, 255]
    assert (np.diff(read[..., 0].ravel().astype(int)) >= 0).all()


def test_uniform_deep_grey_is_black(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((5, 7), 1234, np.uint16)).save(path)
    assert not np.asarray(read_picture(path)).any()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    source = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: show it rotated by 90 degrees clockwise
    path = tmp_path / "photo.png"
    source.save(path, exif=exif)
    assert np.array_equal(np.asarray(read_picture(path)), np.rot90(gradient(), -1))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""
    chunk = png_chunk
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_huge_picture_is_refused_before_it_is_unpacked(tmp_path: Path, side: int) -> None:
    assert side * side > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_declares(side, side))
    with pytest.raises(ValueError, match=r"bomb\.png: expected at most 100,000,000 pixels, got"):
        read_picture(path)


def test_thin_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (1001, 10)).save(path)
    with pytest.raises(ValueError, match="ratio up to 100:1, got 1001 x 10"):
        read_picture(path)


def test_not_finite_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.tiff"
    values = np.ones((8, 8), np.float32)
    values[2, 3] = np.nan
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match="finite pixel values"):
        read_picture(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got another kind of file"),
        (b"no picture at all", "got another kind of file"),
        (b"\x89PNG\r\n\x1a\n", "got"),
    ],
    ids=["empty", "text", "png signature only"],
)
def test_not_a_picture(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_picture(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "gif", "bmp", "webp"])
def test_truncated_picture_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"photo .*photo\." + suffix):
        read_picture(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a picture file"):
        read_picture(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="got a directory"):
        read_picture(tmp_path)


def rgb16(bits: int) -> np.ndarray:
    """The gradient as colours of so many bits."""
    return (gradient().astype(np.uint32) * ((1 << bits) - 1) // 255).astype(np.uint16)


def told(path: Path) -> tuple[np.ndarray, list[str]]:
    """The picture as read, and what was told about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = np.asarray(read_picture(path))
    return read, [one.message.reason for one in caught if isinstance(one.message, DataWarning)]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif", "ppm", "jp2"])
def test_colours_of_16_bits_keep_their_brightness(tmp_path: Path, suffix: str, bits: int) -> None:
    path = tmp_path / f"photo.{suffix}"
    options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000] if suffix == "jp2" else []
    large = np.kron(rgb16(bits), np.ones((8, 8, 1), np.uint16))
    assert cv2.imwrite(str(path), large[..., ::-1], options)
    read, reasons = told(path)
    assert np.abs(read.astype(int) - np.kron(gradient(), np.ones((8, 8, 1)))).max() <= 1
    assert any("use only" in reason for reason in reasons) == (bits < 16)


@pytest.mark.parametrize("kind", ["strips", "big-endian", "tiles", "deflate", "bigtiff"])
def test_tiffs_of_16_bits_of_every_make(tmp_path: Path, kind: str) -> None:
    options = {
        "strips": {"rowsperstrip": 7},
        "big-endian": {"byteorder": ">"},
        "tiles": {"tile": (16, 16)},
        "deflate": {"compression": "deflate"},
        "bigtiff": {"bigtiff": True},
    }[kind]
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, rgb16(12), photometric="rgb", **options)
    assert np.abs(told(path)[0].astype(int) - gradient()).max() <= 1


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(cv2.imencode(".png", rgb16(12)[..., ::-1])[1].tobytes())
    assert np.abs(told(path)[0].astype(int) - gradient()).max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("scale", "said"), [(1, False), (40, True)], ids=["0-to-1", "other-range"])
def test_colours_of_floats(tmp_path: Path, dtype: type, scale: float, said: bool) -> None:
    path = tmp_path / "photo.tif"
    values = (gradient() / 255 * scale).astype(dtype)
    values[0, 0], values[0, 1] = 0, scale
    tifffile.imwrite(path, values, photometric="rgb")
    read, reasons = told(path)
    assert np.abs(read[1:].astype(int) - gradient()[1:]).max() <= 1
    assert any("stretched" in reason for reason in reasons) == said


TURNED = {
    1: gradient(),
    2: gradient()[:, ::-1],
    3: np.rot90(gradient(), 2),
    4: gradient()[::-1],
    5: gradient().swapaxes(0, 1),
    6: np.rot90(gradient(), -1),
    7: np.rot90(gradient(), 2).swapaxes(0, 1),
    8: np.rot90(gradient()),
}


@pytest.mark.parametrize("turned_by", TURNED)
@pytest.mark.parametrize("kind", ["png", "webp", "tif", "png16", "tif16", "grey16"])
def test_every_orientation_is_applied_once(tmp_path: Path, kind: str, turned_by: int) -> None:
    path = tmp_path / f"photo.{kind.removesuffix('16').replace('grey', 'tif')}"
    if kind in ("tif", "tif16", "grey16"):
        pixels = rgb16(16) if kind != "tif" else gradient()
        pixels = pixels[..., 0] if kind == "grey16" else pixels
        photometric = "minisblack" if kind == "grey16" else "rgb"
        tifffile.imwrite(path, pixels, photometric=photometric, extratags=[(274, "H", 1, turned_by, True)])
    else:
        exif = Image.Exif()
        exif[0x0112] = turned_by
        if kind == "png16":
            content = cv2.imencode(".png", rgb16(16)[..., ::-1])[1].tobytes()
            path.write_bytes(content[:33] + png_chunk(b"eXIf", exif.tobytes()[6:]) + content[33:])
        else:
            Image.fromarray(gradient()).save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    read = told(path)[0].astype(int)
    if kind == "grey16":
        values = TURNED[turned_by][..., :1].astype(float)
        assert np.abs(read - (values - values.min()) * 255 / np.ptp(values)).max() <= 1
    else:
        assert np.array_equal(read, TURNED[turned_by])
    assert stored_size(path) == (40, 30)
    assert orientation(path) == turned_by
    assert np.array_equal(turn(gradient(), turned_by), TURNED[turned_by])


ALPHA = np.full((30, 40), 255, np.uint8)
ALPHA[:10], ALPHA[10] = 0, 128
INFRARED = np.full((30, 40), 60, np.uint8)


@pytest.mark.parametrize("deep", [False, True], ids=["8-bit", "16-bit"])
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize(
    ("band", "extra", "is_opacity"),
    [
        (INFRARED, "unassalpha", False),
        (INFRARED, "assocalpha", False),
        (INFRARED, "unspecified", False),
        (gradient()[..., 0], "unassalpha", False),
        (np.zeros((30, 40), np.uint8), "unassalpha", False),
        (ALPHA, "unassalpha", True),
        (ALPHA, "assocalpha", True),
        (ALPHA, "unspecified", False),
    ],
    ids=[
        "infrared-as-alpha",
        "infrared-as-premultiplied",
        "infrared",
        "ramp-as-alpha",
        "nothing-opaque",
        "alpha",
        "premultiplied",
        "alpha-not-said",
    ],
)
def test_the_fourth_band_of_a_tiff(
    tmp_path: Path, band: np.ndarray, extra: str, is_opacity: bool, compression: str | None, deep: bool
) -> None:
    colour = gradient()
    if extra == "assocalpha" and is_opacity:
        colour = (colour * (band[..., None] / 255)).astype(np.uint8)
    bands = np.dstack([colour, band])
    bands = bands.astype(np.uint16) * 257 if deep else bands
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, bands, photometric="rgb", extrasamples=[extra], compression=compression)
    read, reasons = told(path)
    expected = gradient().astype(int)
    if is_opacity:
        opacity = band[..., None] / 255
        expected = expected * opacity + 255 * (1 - opacity)
    assert np.abs(read - expected).max() <= 2
    assert any("not used" in reason for reason in reasons) != is_opacity


def test_four_bands_without_a_word_about_the_fourth(tmp_path: Path) -> None:
    """A TIFF without ExtraSamples: the fourth band is data, even if it looks like opacity."""
    path = tmp_path / "photo.tif"
    for band in (INFRARED, ALPHA):
        tifffile.imwrite(path, np.dstack([gradient(), band]), photometric="rgb", extrasamples=["unspecified"])
        content = path.read_bytes()
        at = content.index((338).to_bytes(2, "little") + (3).to_bytes(2, "little"))
        path.write_bytes(content[:at] + (65000).to_bytes(2, "little") + content[at + 2 :])
        read, reasons = told(path)
        assert np.array_equal(read, gradient())
        assert any("not used" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("bands", "dtype", "planar"),
    [(2, np.uint16, "contig"), (5, np.uint16, "contig"), (8, np.uint8, "contig"), (3, np.uint16, "separate")],
)
def test_tiffs_of_bands_without_meaning_are_refused(tmp_path: Path, bands: int, dtype: type, planar: str) -> None:
    path = tmp_path / "photo.tif"
    shape = (20, 30, bands) if planar == "contig" else (bands, 20, 30)
    photometric = "rgb" if planar == "separate" else "minisblack"
    tifffile.imwrite(path, np.ones(shape, dtype), planarconfig=planar, photometric=photometric)
    with pytest.raises(ValueError, match=rf"photo\.tif: expected a TIFF .* got one of {bands} bands .*gdal_translate"):
        read_picture(path)


def test_deep_grey_with_transparency_is_stretched_over_what_is_seen(tmp_path: Path) -> None:
    values = np.linspace(1000, 2000, 400).astype(np.uint16).reshape(20, 20)
    values[0] = 60000
    key = struct.pack(">H", 60000)
    content = cv2.imencode(".png", values)[1].tobytes()
    path = tmp_path / "photo.png"
    path.write_bytes(content[:33] + png_chunk(b"tRNS", key) + content[33:])
    read, _ = told(path)
    assert (read[0] == 255).all()
    assert read[1, 0, 0] == 0
    assert read[-1, -1, 0] == 255


@pytest.mark.parametrize("form", ["png", "webp", "gif"])
def test_a_picture_that_shows_nothing_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"photo.{form}"
    Image.new("RGBA", (20, 20), (90, 80, 70, 0)).save(path)
    with pytest.raises(ValueError, match="transparent everywhere"):
        read_picture(path)


@pytest.mark.parametrize("form", ["gif", "tif", "webp", "png"])
def test_the_first_of_several_frames_is_read_and_said(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"photo.{form}"
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    read, reasons = told(path)
    assert read[..., 0].mean() > 190
    assert read[..., 1].mean() < 10
    assert any("only the first" in reason for reason in reasons)


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_ordinary_pictures_are_read_without_a_word(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"photo.{form}"
    Image.fromarray(gradient()).save(path)
    assert told(path)[1] == []


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: expected a picture file, got a pipe or a device"):
        read_picture(tmp_path / "pipe.png")


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(gradient()).save(path)
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as workers:
        list(workers.map(read_picture, [path] * 60))
    assert warnings.filters == before


@pytest.mark.parametrize("hot", [1, 8], ids=["one-pixel", "a-few"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_hot_pixels_do_not_leave_the_picture_dark(tmp_path: Path, bits: int, hot: int) -> None:
    large = np.kron(rgb16(bits), np.ones((9, 9, 1), np.uint16))
    large[0, :hot] = 65535
    path = tmp_path / "photo.png"
    assert cv2.imwrite(str(path), large[..., ::-1])
    read, reasons = told(path)
    assert np.abs(read[1:].astype(int) - np.kron(gradient(), np.ones((9, 9, 1)))[1:]).max() <= 1
    assert (read[0, :hot] == 255).all()
    assert sum("brighter than white" in reason for reason in reasons) == 1


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_a_tiff_whose_zero_is_white_is_no_negative(tmp_path: Path, dtype: type, order: str) -> None:
    ramp = np.linspace(0, 255, 256).astype(dtype).reshape(16, 16)
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, ramp, photometric="miniswhite", byteorder=order)
    assert (told(path)[0][..., 0] == 255 - np.arange(256).reshape(16, 16)).all()


def test_large_and_signed_numbers_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "photo.tif"
    for values in (np.linspace(0, 4e9, 256).astype(np.uint32), np.arange(-128, 128).astype(np.int8)):
        tifffile.imwrite(path, values.reshape(16, 16), photometric="minisblack")
        assert (told(path)[0][..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_advice_names_bands_that_are_there(tmp_path: Path, bands: int) -> None:
    path = tmp_path / "photo.tif"
    pixels = np.ones((20, 30, bands), np.uint16) if bands > 1 else np.ones((20, 30), np.complex64)
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig" if bands > 1 else None)
    with pytest.raises(ValueError, match="gdal_translate -b 1 -b 2" if bands > 2 else "gdal_translate -b 1 -ot"):
        read_picture(path)


@pytest.mark.parametrize("key", [0, bytes([0, 128, 255])], ids=["one-colour", "bytes"])
def test_a_palette_with_transparency_is_read_without_pillows_warning(tmp_path: Path, key: int | bytes) -> None:
    source = Image.fromarray((np.arange(64).reshape(8, 8) % 3).astype(np.uint8), "P")
    source.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    source.save(tmp_path / "photo.png", transparency=key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_picture(tmp_path / "photo.png")


def test_opencv_logs_nothing_about_tags_and_keeps_its_level(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, rgb16(16), photometric="rgb", extratags=[(65000, "H", 1, 7, True)])
    before = cv2.utils.logging.getLogLevel()
    with ThreadPoolExecutor(4) as workers:
        list(workers.map(read_picture, [path] * 20))
    assert cv2.utils.logging.getLogLevel() == before
    assert capfd.readouterr().err == ""
