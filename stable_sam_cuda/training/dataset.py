"""Data sets of pictures with objects: found, chosen, checked, and framed as SAM sees them."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from stable_sam_cuda.training.layouts import find_samples
from stable_sam_cuda.training.samples import Sample


def find_masked_images(root: Path, split: str | None = None, layout: str = "auto") -> list[Sample]:
    """Every picture with objects below ``root``, in the layouts of `find_samples`.

    With ``split``, only the names that ``root/splits.json`` lists under it.

    Raises:
        ValueError: nothing is found, a name occurs twice, the split or the layout is unknown, or a COCO file is broken.
    """
    found: dict[str, Sample] = {}
    for sample in find_samples(root, layout):
        if sample.name in found:
            raise ValueError(f"data: expected each name once below {root}, got two pictures named {sample.name}")
        found[sample.name] = sample
    if not found:
        raise ValueError(
            f"data: expected images/ and masks/ folders, pairs of .jpg and .png, or a COCO file below {root}, "
            f"found no picture with a mask (layout {layout})"
        )
    if split is None:
        return list(found.values())
    names = _splits(root)
    if split not in names:
        raise ValueError(f"split: expected one of {sorted(names)}, got {split!r}")
    missing = [name for name in names[split] if name not in found]
    if missing:
        raise ValueError(f"split {split!r}: {len(missing)} listed pictures are missing, the first is {missing[0]}")
    return [found[name] for name in names[split]]


def _splits(root: Path) -> dict[str, list[str]]:
    path = root / "splits.json"
    if not path.is_file():
        raise ValueError(f"split: expected splits named in {path}, got no such file")
    return json.loads(path.read_text())


def check_samples(
    samples: Sequence[Sample], progress: Callable[[int], None] = lambda count: None
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples that can be used, and of the others the name and what is wrong with them.

    Every sample is loaded once, by several threads: a picture or a mask that is missing, damaged or of another size
    than its counterpart, and a mask without an object, are told here and not after an hour of training.
    ``progress`` hears of each sample.
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
) -> list[Sample]:
    """The pictures of a split without the sets in ``exclude``; with ``limit``, so many of them, drawn by ``seed``.

    Raises:
        ValueError: as `find_masked_images`; or nothing is left.
    """
    samples = [sample for sample in find_masked_images(root, split, layout) if sample.set_name not in exclude]
    if limit is not None and limit < len(samples):
        picks = np.random.default_rng(seed).choice(len(samples), limit, replace=False)
        samples = [samples[index] for index in sorted(picks)]
    if not samples:
        raise ValueError(f"exclude: nothing is left of {root} without {', '.join(exclude)}")
    return samples
