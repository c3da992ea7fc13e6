"""Augmentation of training pictures: flip, large-scale jitter, colour."""

import numpy as np

from stable_sam_cuda.data.dataset import crop_square, fit_square


def augmented(
    image: np.ndarray,
    ids: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scales: tuple[float, float] = (0.5, 2.0),
    recolour: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """A flipped, rescaled, cropped and, with ``recolour``, recoloured square window of ``size`` px.

    The scale is log-uniform relative to the picture that just fits; a window without an object
    falls back to the whole picture.
    """
    if rng.random() < 0.5:
        image, ids = image[:, ::-1], ids[:, ::-1]
    image, ids = np.ascontiguousarray(image), np.ascontiguousarray(ids)
    scale = size / max(ids.shape) * np.exp(rng.uniform(*np.log(scales)))
    spare = [max(0, round(side * scale) - size) for side in ids.shape]
    corner = (int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1)))
    window, window_ids = crop_square(image, ids, size, scale, corner)
    if not window_ids.any():
        window, window_ids = fit_square(image, ids, size)
    return _recoloured(window, rng) if recolour else window, window_ids


def _recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random gain and bias a channel, sometimes grey; the padding stays black."""
    padding = ~image.any(axis=2, keepdims=True)
    values = image.astype(np.float32)
    if rng.random() < 0.1:
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)
    gain = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, 3)
    values = (values - 127) * gain.astype(np.float32) + 127 + np.float32(rng.uniform(-25, 25))
    return np.where(padding, 0, values.clip(0, 255)).astype(np.uint8)
