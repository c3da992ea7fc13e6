"""Damaged picture files: each gives a picture or one error that names the file, and none takes much memory."""

import io
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.data.masks import read_ids
from stable_sam_cuda.data.picture import read_picture

LIMIT = 2 << 30  # bytes of memory that no file may need


def whole_files() -> dict[str, bytes]:
    """One small file of every format, by its suffix."""
    random_numbers = np.random.default_rng(0)
    shades = np.kron(random_numbers.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    colour, grey = Image.fromarray(shades), Image.fromarray(shades[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}

    def keep(name: str, picture: Image.Image, form: str, **options: object) -> None:
        stream = io.BytesIO()
        picture.save(stream, form, **options)
        files[name] = stream.getvalue()

    keep("a.png", colour, "PNG", exif=exif)
    keep("p.png", colour.quantize(7), "PNG", transparency=2)
    keep("a.jpg", colour, "JPEG", exif=exif)
    keep("progressive.jpg", colour, "JPEG", progressive=True, icc_profile=bytes(200))
    keep("raw.tif", colour, "TIFF", exif=exif)
    keep("lzw.tif", colour, "TIFF", compression="tiff_lzw")
    keep("grey.tif", Image.fromarray(shades[..., 0].astype(np.uint16) * 16), "TIFF")
    keep("a.webp", colour, "WEBP", lossless=True, exif=exif)
    keep("b.webp", colour, "WEBP")
    keep("a.gif", colour.quantize(20), "GIF", save_all=True, append_images=[grey.quantize(9)])
    keep("a.bmp", colour, "BMP")
    deep = shades.astype(np.uint16) * 16
    for name in ("deep.png", "deep.tif"):
        files[name] = cv2.imencode(name[-4:], deep)[1].tobytes()
    files["alpha.png"] = cv2.imencode(".png", np.dstack([deep, deep[..., 0]]))[1].tobytes()
    files["floats.tif"] = cv2.imencode(".tif", shades.astype(np.float32) / 255)[1].tobytes()
    return files


def mutated(content: bytes, numbers: random.Random) -> bytes:
    """A file with some of its bytes changed, cut off, repeated or lost; half of the time near its header."""
    changed = bytearray(content)
    for _ in range(numbers.choice((1, 1, 2, 4, 12))):
        reach = len(changed) if numbers.random() < 0.5 else min(len(changed), 120)
        place = numbers.randrange(reach)
        way = numbers.randrange(6)
        if way == 0:
            changed[place] ^= 1 << numbers.randrange(8)
        elif way == 1:
            changed[place] = numbers.choice((0, 1, 127, 128, 254, 255))
        elif way == 2:
            width = numbers.choice((2, 4))
            changed[place : place + width] = numbers.choice((b"\xff", b"\x7f", b"\0")) * width
        elif way == 3:
            del changed[max(place, 8) :]
        elif way == 4:
            del changed[place : place + numbers.randrange(1, 9)]
        else:
            changed[place:place] = changed[place : place + numbers.randrange(1, 33)]
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed)


def read_mutated(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Read so many mutated files as pictures and as masks; how many were read and refused."""
    numbers = random.Random(seed)
    files = whole_files()
    read = refused = 0
    warnings.simplefilter("ignore")
    for index in range(count):
        name = numbers.choice(sorted(files))
        path = folder / f"{index:05}_{name}"
        path.write_bytes(mutated(files[name], numbers))
        for reader in (read_picture, read_ids):
            try:
                result = reader(path)
                assert np.asarray(result).size > 0
                read += 1
            except (ValueError, OSError) as error:
                assert path.name in str(error), f"{path.name} is not named: {error!r}"
                assert "expected" in str(error), f"no reason: {error!r}"
                refused += 1
        path.unlink()
    return read, refused


@pytest.mark.parametrize(
    ("count", "seed"), [(120, 1), pytest.param(2000, 2, marks=pytest.mark.slow)], ids=["120-files", "2000-files"]
)
def test_damaged_files_are_read_or_refused_by_name(count: int, seed: int) -> None:
    """In a process of its own, which a decoder may kill, and whose memory is its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(count), str(seed)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused, peak = map(int, done.stdout.split())
    assert read + refused == 2 * count
    assert refused > count / 4
    assert peak < LIMIT


if __name__ == "__main__":
    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as kept:
        print(*read_mutated(int(sys.argv[1]), int(sys.argv[2]), Path(kept)), end=" ")
    # Not getrusage: its peak begins with that of the process that started this one.
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
