"""What a rehearsal trains on: a few drawn pictures, and an untrained base for 64 px."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from rows import EXCLUDED

from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.training.sam_lite.weights import save_weights

IMAGE_SIZE = 64
SETS = {"train": 12, "val": 4, "test": 4, **dict.fromkeys(EXCLUDED, 1)}  # pictures


def draw_data(root: Path) -> None:
    """SET/images, SET/masks and splits.json of pictures with two ellipses each; what rows exclude is there, too."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name, count in SETS.items():
        for folder in ("images", "masks"):
            (root / name / folder).mkdir(parents=True)
        for stem in range(count):
            height, width = (int(side) for side in rng.integers(70, 110, 2))
            image = rng.integers(0, 80, (height, width, 3)).astype(np.uint8)
            ids = np.zeros((height, width), np.uint8)
            for object_id, x in ((1, width // 4), (2, 3 * width // 4)):
                axes = (int(rng.integers(9, 15)), int(rng.integers(12, 28)))
                cv2.ellipse(ids, (x, height // 2), axes, 0, 0, 360, object_id, -1)
                image[ids == object_id] = rng.integers(120, 255, 3)
            cv2.imwrite(str(root / name / "images" / f"{stem}.jpg"), image)
            cv2.imwrite(str(root / name / "masks" / f"{stem}.png"), ids)
        splits[name if name in splits else "train"] += [f"{name}/{stem}" for stem in range(count)]
    (root / "splits.json").write_text(json.dumps(splits))


def write_untrained(path: Path) -> None:
    """Weights to start from, so that a rehearsal needs no package with ImageNet's."""
    torch.manual_seed(0)
    save_weights(new_sam_lite("lite0", IMAGE_SIZE), path, variant="lite0")
