"""A small data set of drawn shapes, and a small sam_lite to train on."""

import cv2
import numpy as np
import pytest
import torch

from stable_sam_cuda.sam.lite import new_sam_lite


def draw_picture(rng):
    """Two ellipses on noise: picture (H, W, 3) and object ids (H, W)."""
    height, width = (int(side) for side in rng.integers(60, 100, 2))
    image = rng.integers(0, 80, (height, width, 3)).astype(np.uint8)
    ids = np.zeros((height, width), np.uint8)
    for object_id, x in ((1, width // 4), (2, 3 * width // 4)):
        axes = (int(rng.integers(8, 14)), int(rng.integers(10, 25)))
        cv2.ellipse(ids, (x, height // 2), axes, 0, 0, 360, object_id, -1)
        image[ids == object_id] = rng.integers(120, 255, 3)
    return image, ids


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """SET/images and SET/masks of eight drawn pictures, in two sets."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for set_name in ("ellipses", "ovals"):
        (root / set_name / "images").mkdir(parents=True)
        (root / set_name / "masks").mkdir()
        for stem in range(4):
            image, ids = draw_picture(rng)
            cv2.imwrite(str(root / set_name / "images" / f"{stem}.png"), image)
            cv2.imwrite(str(root / set_name / "masks" / f"{stem}.png"), ids)
    return root


@pytest.fixture
def small_sam():
    """An untrained sam_lite for 64 px: the embedding is (256, 8, 8). Always the same weights."""
    torch.manual_seed(0)
    return new_sam_lite("lite0", 64)
