"""Copy-paste augmentation: objects cut out of one picture and pasted onto another (Ghiasi et al., 2021)."""

import numpy as np

from stable_sam_cuda.data.dataset import object_masks

MAX_OBJECTS = 2
AREAS = (0.005, 0.25)  # of the frame: what is smaller teaches little, what is larger hides the picture


def paste_objects(
    image: np.ndarray, ids: np.ndarray, other: np.ndarray, other_ids: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Picture (S, S, 3) and ids (S, S), up to `MAX_OBJECTS` of the other's objects pasted on top, in their places.

    What a pasted object covers is lost to the objects below it. Pasted objects have ids above all others.
    """
    low, high = (area * ids.size for area in AREAS)
    candidates = [mask for mask in object_masks(other_ids) if low <= mask.sum() <= high]
    if not candidates:
        return image, ids
    count = int(rng.integers(1, min(MAX_OBJECTS, len(candidates)) + 1))
    image, ids = image.copy(), ids.astype(np.int64)
    for index in rng.choice(len(candidates), count, replace=False):
        mask = candidates[index]
        image[mask] = other[mask]
        ids[mask] = ids.max() + 1
    return image, ids
