"""Data sets of pictures with objects: found, chosen, checked, and framed as SAM sees them."""

import os
import reprlib
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from stable_sam_cuda.data.coco_images import CocoImage
from stable_sam_cuda.data.layouts import find_samples
from stable_sam_cuda.data.samples import MaskedImage, Sample
from stable_sam_cuda.files import read_json
from stable_sam_cuda.notes import printable

# What a damaged file can make a reader raise. Anything else is a defect of the reader, and ends the run.
DATA_FAULTS = (ValueError, OSError, EOFError, MemoryError, RecursionError, ArithmeticError, struct.error, zlib.error)


def find_masked_images(
    root: Path, split: str | None = None, layout: str = "auto", *, masks: str = "auto", crowds: str = "skip"
) -> list[Sample]:
    """Every picture with objects below ``root``, in the layouts of `find_samples`.

    With ``split``, only the names that ``root/splits.json`` lists under it. ``masks`` and ``crowds`` are as
    `find_samples` has them.

    Raises:
        ValueError: nothing is found, a name occurs twice, the split or the layout is unknown, or ``root`` is a broken
            COCO file.
        OSError: ``root`` cannot be read.
    """
    return _of_split(_by_name(root, layout, masks, crowds), root, split)


def _by_name(root: Path, layout: str, masks: str, crowds: str) -> dict[str, Sample]:
    found: dict[str, Sample] = {}
    for sample in find_samples(root, layout, masks=masks, crowds=crowds):
        if sample.name in found:
            raise ValueError(_same_name(root, found[sample.name], sample))
        found[sample.name] = sample
    if not found:
        raise ValueError(
            f"data: expected images/ and masks/ folders, pairs of .jpg and .png, or a COCO file below "
            f"{printable(root)}, found no picture with a mask (layout {layout})"
        )
    return found


def _same_name(root: Path, *two: Sample) -> str:
    """What to do about two samples of one name: choose one of what they come from."""
    places, files, layouts = [], [], set()
    for sample in two:
        if isinstance(sample, CocoImage):
            places.append(f"{printable(sample.image)} of {printable(sample.file)}")
            files.append(sample.file)
            layouts.add("coco")
        elif isinstance(sample, MaskedImage):
            places.append(f"{printable(sample.image)} with {printable(sample.mask)}")
            layouts.add("mixed" if sample.image.parent == sample.mask.parent else "folders")
    if len(layouts) == 2:
        advice = f"take one layout: --layout {' or '.join(sorted(layouts))}"
    elif files:
        advice = f"give one of the COCO files as --data, such as {printable(files[0])}"
    else:
        advice = "move the pictures and masks of one of them into a folder of their own"
    got = f"got two pictures named {two[0].name}: {' and '.join(places)}"
    return f"data: expected each name once below {printable(root)}, {got}; {advice}"


def _of_split(found: dict[str, Sample], root: Path, split: str | None) -> list[Sample]:
    if split is None:
        return list(found.values())
    path = root / "splits.json"
    if not path.is_file():
        raise ValueError(f"split: expected splits named in {printable(path)}, got no such file")
    names = read_splits(path)
    if split not in names:
        raise ValueError(f"split: expected one of {sorted(names)}, got {split!r}")
    if not names[split]:
        raise ValueError(f"split {split!r}: expected names of pictures, got an empty list in {printable(path)}")
    missing = [name for name in names[split] if name not in found]
    if missing:
        first = missing[0] if missing[0].isprintable() else repr(missing[0])
        raise ValueError(f"split {split!r}: {len(missing)} listed pictures are missing, the first is {first}")
    return [found[name] for name in names[split]]


def read_splits(path: Path) -> dict[str, list[str]]:
    """The names of pictures that a ``splits.json`` lists, by split.

    Raises:
        ValueError: it is no JSON, no object of lists of names, or lists a name or a split twice.
        OSError: it cannot be read.
    """
    splits = read_json(path, "an object of lists of names")
    if not isinstance(splits, dict):
        raise ValueError(f"{printable(path)}: expected an object of lists of names, got {reprlib.repr(splits)}")
    for split, names in splits.items():
        if not isinstance(names, list):
            raise ValueError(f"{printable(path)}: {split!r}: expected a list of names, got {reprlib.repr(names)}")
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"{printable(path)}: {split!r}: expected names, got {reprlib.repr(name)}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"{printable(path)}: {split!r}: expected each name once, got {twice[0]!r} twice")
    return splits


def check_samples(
    samples: Sequence[Sample], progress: Callable[[int], None] = lambda count: None
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples that can be used, and of the others the name and what is wrong with them.

    Every sample is loaded once, by several threads: a picture or a mask that is missing, damaged or of another size
    than its counterpart, and a mask without an object, are told here and not after an hour of training.
    ``progress`` hears of each sample.

    Raises:
        RuntimeError: loading a sample met with a defect of the reader; the message names the sample.
    """
    good: list[Sample] = []
    broken: list[tuple[str, str]] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers:
        for sample, fault in zip(samples, workers.map(_fault, samples), strict=True):
            if fault is None:
                good.append(sample)
            else:
                broken.append((sample.name, fault))
            progress(1)
    return good, broken


def _fault(sample: Sample) -> str | None:
    try:
        _, ids = sample.load()
    except (ValueError, OSError) as error:
        return " ".join(str(error).split()).removeprefix(f"{sample.name}: ")
    except (*DATA_FAULTS, cv2.error) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    except Exception as error:
        raise RuntimeError(f"{sample.name}: reading it failed with {type(error).__name__}: {error}") from error
    return None if ids.any() else "the mask is empty"


def object_masks(ids: np.ndarray, minimum_pixels: int = 1) -> list[np.ndarray]:
    """The boolean mask (H, W) of each object of at least ``minimum_pixels``, in the order of their ids."""
    counts = np.bincount(ids.ravel(), minlength=2)
    return [ids == object_id for object_id in np.flatnonzero(counts[1:] >= minimum_pixels) + 1]


def fit_square(image: np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """SAM's input frame: the longest side scaled to ``size``, padded at the bottom and on the right."""
    return crop_square(image, ids, size, size / max(ids.shape), (0, 0))


def crop_square(
    image: np.ndarray, ids: np.ndarray, size: int, scale: float, corner: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The window of ``size`` px whose top left is ``corner`` (y, x) of the picture scaled by ``scale``; zero padded."""
    height, width = (max(1, round(side * scale)) for side in ids.shape)
    y, x = corner
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    # Resize only the part that is seen.
    top, left = int(y / scale), int(x / scale)
    bottom, right = (
        min(ids.shape[0], int(np.ceil((y + size) / scale))),
        min(ids.shape[1], int(np.ceil((x + size) / scale))),
    )
    seen = (max(1, min(size, width - x)), max(1, min(size, height - y)))
    image_part = cv2.resize(image[top:bottom, left:right], seen, interpolation=interpolation)
    ids_part = cv2.resize(ids[top:bottom, left:right], seen, interpolation=cv2.INTER_NEAREST)
    framed_image = np.zeros((size, size, 3), np.uint8)
    framed_ids = np.zeros((size, size), ids.dtype)
    framed_image[: seen[1], : seen[0]] = image_part
    framed_ids[: seen[1], : seen[0]] = ids_part
    return framed_image, framed_ids


def choose_samples(
    root: Path,
    split: str | None,
    exclude: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    layout: str = "auto",
    *,
    masks: str = "auto",
    crowds: str = "skip",
) -> list[Sample]:
    """The pictures of a split without the sets in ``exclude``; with ``limit``, so many of them, drawn by ``seed``.

    Raises:
        ValueError: as `find_masked_images`; ``exclude`` names a set that is not there, ``limit`` is below 1, or
            nothing is left.
        OSError: as `find_masked_images`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected 1 or more, got {limit}")
    found = _by_name(root, layout, masks, crowds)
    sets = {sample.set_name for sample in found.values()}
    unknown = [name for name in exclude if name not in sets]
    if unknown:
        known = ", ".join(sorted(sets)[:8]) + (", ..." if len(sets) > 8 else "")
        raise ValueError(f"exclude: expected sets of {printable(root)} ({known}), got {unknown[0]!r}")
    samples = [sample for sample in _of_split(found, root, split) if sample.set_name not in exclude]
    if limit is not None and limit < len(samples):
        picks = np.random.default_rng(seed).choice(len(samples), limit, replace=False)
        samples = [samples[index] for index in sorted(picks)]
    if not samples:
        raise ValueError(f"exclude: nothing is left of {printable(root)} without {', '.join(exclude)}")
    return samples
