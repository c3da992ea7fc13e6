"""Photographs of every kind come in as 8-bit RGB, the right way up; everything else is refused by name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.picture import MAX_PIXELS, read_picture


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


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

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
