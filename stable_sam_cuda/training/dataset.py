"""Photographs with object masks on disk: ``SET/images/STEM.jpg`` beside ``SET/masks/STEM.png``.

A mask is one 8-bit channel: 0 background, 255 the object of a binary set, or 1..N the objects' ids.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class MaskedImage:
    """One picture and its mask on disk; ``name`` is ``SET/STEM``."""

    name: str
    image: Path
    mask: Path

    @property
    def set_name(self) -> str:
        return self.name.rsplit("/", 1)[0]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) RGB uint8 and object ids (H, W) uint8.

        Raises:
            ValueError: a file cannot be read, or picture and mask differ in size.
        """
        image = cv2.imread(str(self.image), cv2.IMREAD_COLOR)
        ids = cv2.imread(str(self.mask), cv2.IMREAD_GRAYSCALE)
        if image is None or ids is None:
            raise ValueError(f"{self.name}: cannot read {self.image if image is None else self.mask}")
        if image.shape[:2] != ids.shape:
            raise ValueError(f"{self.name}: picture has size {image.shape[:2]}, its mask {ids.shape}")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), ids


def find_masked_images(root: Path, split: str | None = None) -> list[MaskedImage]:
    """Every picture with a mask below ``root``: one images/ + masks/ folder, or a tree of them.

    With ``split``, only the names that ``root/splits.json`` lists under it.

    Raises:
        ValueError: nothing is found, or the split is unknown.
    """
    found = {}
    for folder in sorted(root.rglob("images")):
        masks = folder.parent / "masks"
        for image in sorted(folder.iterdir()) if masks.is_dir() else []:
            mask = masks / f"{image.stem}.png"
            if image.suffix.lower() in IMAGE_SUFFIXES and mask.is_file():
                set_name = folder.parent.relative_to(root).as_posix()
                name = f"{root.name if set_name == '.' else set_name}/{image.stem}"
                found[name] = MaskedImage(name, image, mask)
    if split is not None:
        splits = json.loads((root / "splits.json").read_text())
        if split not in splits:
            raise ValueError(f"split: expected one of {sorted(splits)}, got {split!r}")
        missing = [name for name in splits[split] if name not in found]
        if missing:
            raise ValueError(f"split {split!r}: {len(missing)} listed pictures are missing, the first is {missing[0]}")
        found = {name: found[name] for name in splits[split]}
    if not found:
        raise ValueError(f"data: expected images/ and masks/ folders below {root}, found no picture with a mask")
    return list(found.values())


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
    framed_ids = np.zeros((size, size), np.uint8)
    framed_image[: seen[1], : seen[0]] = image_part
    framed_ids[: seen[1], : seen[0]] = ids_part
    return framed_image, framed_ids


def choose_samples(
    root: Path, split: str | None, exclude: Sequence[str] = (), limit: int | None = None, seed: int = 0
) -> list[MaskedImage]:
    """The pictures of a split without the sets in ``exclude``; with ``limit``, so many of them, drawn by ``seed``.

    Raises:
        ValueError: as `find_masked_images`; or nothing is left.
    """
    samples = [sample for sample in find_masked_images(root, split) if sample.set_name not in exclude]
    if limit is not None and limit < len(samples):
        picks = np.random.default_rng(seed).choice(len(samples), limit, replace=False)
        samples = [samples[index] for index in sorted(picks)]
    if not samples:
        raise ValueError(f"exclude: nothing is left of {root} without {', '.join(exclude)}")
    return samples
