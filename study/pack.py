"""A data set on its way to another machine: pictures shrunk to the training size, in a few tar files.

    python study/pack.py --data DATA --out PACKS --size 512 --part-mib 60
    python study/pack.py --unpack PACKS --data DIR

Packing reads any layout that training reads, and unpacking leaves SET/images/STEM.jpg, SET/masks/STEM.png and
splits.json, with the names that the pictures had. Masks keep their objects' ids; an object that is too small to be seen
at the new size is named, on the console and in PACKS/vanished.json.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pack_parts import read_parts, write_parts

from stable_sam_cuda.data.dataset import find_masked_images, read_splits
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.files import save_bytes

SPLITS = "splits.json"
QUALITY = 80  # of JPEG: 0.03 MB a picture of 512 px
CHUNK = 64  # pictures that are in memory at once
MEMBER = re.compile(r"(?:[^/]+/)+(?:images/[^/]+\.jpg|masks/[^/]+\.png)")


class Packed(NamedTuple):
    """One picture as it is packed, its mask, and the ids of objects that the new size has no pixel for."""

    name: str
    image: bytes
    mask: bytes
    vanished: list[int]


def shrunk(sample: Sample, size: int, quality: int = QUALITY) -> Packed:
    """A picture of at most ``size`` px, never enlarged, as JPEG, and its ids (nearest neighbour) as 8-bit PNG.

    Raises:
        ValueError, OSError: the sample cannot be read, or its ids do not go into 8 bits.
    """
    image, ids = sample.load()
    found = np.unique(ids)
    if found[-1] > 255:
        raise ValueError(f"{sample.name}: expected ids up to 255, got {found}")
    scale = min(1.0, size / max(ids.shape))
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in (ids.shape[1], ids.shape[0]))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        ids = cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST)
    jpeg = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    vanished = np.setdiff1d(found, np.unique(ids)).tolist()
    return Packed(
        sample.name,
        cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), jpeg)[1].tobytes(),
        cv2.imencode(".png", ids.astype(np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes(),
        [object_id for object_id in vanished if object_id != 0],
    )


def pack(
    data: Path, out: Path, size: int, part_bytes: int, splits: Sequence[str] | None = None, quality: int = QUALITY
) -> tuple[list[Path], dict[str, list[int]]]:
    """Write ``data`` into parts in ``out``; their paths, and by picture the ids of objects that vanished.

    Args:
        splits: only the pictures that splits.json lists under these names; None for all pictures.

    Raises:
        ValueError: an argument is out of range; as `find_masked_images`, `shrunk` and `write_parts`.
        OSError: a picture cannot be read, or ``out`` cannot be written.
    """
    if size < 32:
        raise ValueError(f"size: expected at least 32 px, got {size}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {quality}")
    samples, names = _chosen(data, splits)
    vanished: dict[str, list[int]] = {}

    def files() -> Iterator[tuple[str, bytes]]:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers:
            for start in range(0, len(samples), CHUNK):
                chunk = samples[start : start + CHUNK]
                for packed in workers.map(lambda sample: shrunk(sample, size, quality), chunk):
                    if packed.vanished:
                        vanished[packed.name] = packed.vanished
                    set_name, stem = packed.name.rsplit("/", 1)
                    yield f"{set_name}/images/{stem}.jpg", packed.image
                    yield f"{set_name}/masks/{stem}.png", packed.mask
        if names is not None:  # last, so that a folder that was not unpacked to the end has no splits
            yield SPLITS, json.dumps(names, indent=1).encode()

    paths = write_parts(files(), out, part_bytes)
    save_bytes(out / "vanished.json", json.dumps(vanished, indent=1).encode())
    return paths, vanished


def _chosen(data: Path, splits: Sequence[str] | None) -> tuple[list[Sample], dict[str, list[str]] | None]:
    """Samples in the order of their names, and the splits to write down, None where the data has none."""
    if splits is None and not (data / SPLITS).is_file():
        return sorted(find_masked_images(data), key=lambda sample: sample.name), None
    wanted = list(read_splits(data / SPLITS)) if splits is None else list(splits)
    by_split = {split: find_masked_images(data, split) for split in wanted}
    chosen = find_masked_images(data) if splits is None else [one for part in by_split.values() for one in part]
    unique = {sample.name: sample for sample in chosen}
    names = {split: [sample.name for sample in part] for split, part in by_split.items()}
    return [unique[name] for name in sorted(unique)], names


def unpack(packs: Path, data: Path) -> int:
    """Write the files of ``packs`` below ``data``, except those that are there already; how many were written.

    Raises:
        ValueError: as `read_parts`: nothing is written then.
        OSError: ``data`` cannot be written.
    """
    written = 0
    for name, content in read_parts(packs, lambda name: name == SPLITS or MEMBER.fullmatch(name) is not None):
        path = data / name
        if not (path.is_file() and path.read_bytes() == content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written += 1
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the pictures; with --unpack, where they shall be")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--out", type=Path, help="folder for the parts")
    way.add_argument("--unpack", type=Path, metavar="PACKS", help="folder with parts, to be unpacked into DATA")
    parser.add_argument("--size", type=int, default=512, help="longest side, px")
    parser.add_argument("--part-mib", type=float, default=60, help="size of a part at most, MiB")
    parser.add_argument("--splits", help="only these splits, by commas; default: every picture")
    parser.add_argument("--quality", type=int, default=QUALITY, help="of JPEG, 1 to 100")
    args = parser.parse_args()
    try:
        if args.unpack:
            print(f"{unpack(args.unpack, args.data)} files written to {args.data}")
            return
        splits = args.splits.split(",") if args.splits else None
        parts, vanished = pack(args.data, args.out, args.size, int(args.part_mib * 2**20), splits, args.quality)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for name, ids in vanished.items():
        print(f"vanished at {args.size} px: {name}, ids {', '.join(map(str, ids))}")
    sizes = [path.stat().st_size / 2**20 for path in parts]
    lost = sum(map(len, vanished.values()))
    print(f"{len(parts)} parts, {sum(sizes):.1f} MiB, the largest {max(sizes):.1f} MiB; {lost} objects vanished")


if __name__ == "__main__":
    main()
