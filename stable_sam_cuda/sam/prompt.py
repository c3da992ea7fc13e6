"""Checks of prompts as users give them: one by one as arrays, or a batch as tensors."""

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A checked prompt in pixels of the original picture; what was not given is None.

    points (N, 2) in x, y with labels (N,), 1 foreground and 0 background; box (4,) as x0, y0, x1, y1;
    mask (1, h, w), logits at SAM's low resolution.
    """

    points: NDArray[np.float64] | None
    labels: NDArray[np.int64] | None
    box: NDArray[np.float64] | None
    mask: NDArray[np.float32] | None

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Number of points, box or not, mask or not: prompts of one kind fit into one batch."""
        return (0 if self.points is None else len(self.points)), self.box is not None, self.mask is not None


def check_prompt(
    point_coords: ArrayLike | None,
    point_labels: ArrayLike | None,
    box: ArrayLike | None,
    mask_input: ArrayLike | None,
    *,
    image_size: tuple[int, int],
    mask_size: tuple[int, int],
) -> Prompt:
    """Check a prompt for a picture of ``image_size`` (H, W).

    Arrays, lists and tensors of any dtype and device are taken. A box that reaches beyond the picture is clipped to
    it; one wholly outside is an error.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: no prompt at all, a wrong shape, NaN or infinity, a label other than 0 and 1, a point or box
            outside the picture, a box without width or height, or one in fractions of the picture.
    """
    points, labels = _check_points(point_coords, point_labels, image_size)
    prompt = Prompt(
        points,
        labels,
        box=None if box is None else _check_box(box, image_size),
        mask=None if mask_input is None else _check_mask(mask_input, mask_size),
    )
    if prompt.kind == (0, False, False):
        raise ValueError("prompt: expected at least one of point_coords, box and mask_input, got an empty prompt")
    return prompt


def check_prompt_tensors(
    points: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None,
    masks: Tensor | None,
    *,
    mask_size: tuple[int, int],
) -> None:
    """Check a batch of prompts of one kind: points (B, N, 2), labels (B, N), boxes (B, 4), masks (B, 1, h, w).

    Values are checked of tensors on the CPU alone, since elsewhere the host would wait for the device; there
    `encode_prompts` makes of a bad value a NaN that reaches all of the prompt's results.

    Raises:
        TypeError: an argument is no tensor of numbers.
        ValueError: no prompt at all, a wrong shape, NaN or infinity, a label other than 0, 1 and -1 (padding).
    """
    if points is None and boxes is None and masks is None:
        raise ValueError("prompt: expected at least one of point_coords, boxes and mask_input, got an empty prompt")
    given = {"point_coords": points, "point_labels": labels, "boxes": boxes, "mask_input": masks}
    for name, tensor in given.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__} (predict takes arrays and lists)")
        if tensor is not None and (tensor.is_complex() or tensor.dim() == 0):
            raise TypeError(
                f"{name}: expected real numbers, one row a prompt, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    batch = next(len(tensor) for tensor in (points, boxes, masks) if tensor is not None)
    count = points.shape[1] if points is not None and points.dim() == 3 else "N"
    if count == 0 and batch > 0 and boxes is None and masks is None:
        raise ValueError(f"point_coords: expected at least one point a prompt, got none for {batch}")
    expected = {
        "point_coords": (points, (batch, count, 2), labels is not None),
        "point_labels": (labels, (batch, count), points is not None),
        "boxes": (boxes, (batch, 4), False),
        "mask_input": (masks, (batch, 1, *mask_size), False),
    }
    for name, (tensor, shape, required) in expected.items():
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape and (tensor is not None or required):
            raise ValueError(f"{name}: expected shape {shape}, got {got}")
        if _is_readable(tensor) and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if _is_readable(labels):
        wide = labels.double()  # in 8 bits 255 is equal to -1
        if not ((wide == 1) | (wide == 0) | (wide == -1)).all():
            raise ValueError(f"point_labels: expected 1, 0 or -1 (padding), got {labels.unique().tolist()}")


def _is_readable(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether its values can be had without waiting for a device."""
    return tensor is not None and tensor.device.type == "cpu"


def _check_points(
    point_coords: ArrayLike | None, point_labels: ArrayLike | None, image_size: tuple[int, int]
) -> tuple[NDArray[np.float64] | None, NDArray[np.int64] | None]:
    if (point_coords is None) != (point_labels is None):
        given, lacking = ("point_coords", "point_labels") if point_labels is None else ("point_labels", "point_coords")
        raise ValueError(f"{lacking}: expected with {given}, got None")
    if point_coords is None:
        return None, None
    points, labels = _numbers("point_coords", point_coords), _numbers("point_labels", point_labels)
    if points.size == labels.size == 0:
        return None, None
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"point_coords: expected shape (N, 2), got {points.shape}")
    if labels.shape != points.shape[:1]:
        raise ValueError(f"point_labels: expected shape {points.shape[:1]}, one label a point, got {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"point_labels: expected 1 (foreground) or 0 (background), got {labels.tolist()}")
    _require_finite("point_coords", points)
    height, width = image_size
    if (points < 0).any() or (points > (width, height)).any():
        raise ValueError(f"point_coords: expected points inside the {width} x {height} picture, got {points.tolist()}")
    return points, labels.astype(np.int64)


def _check_box(box: ArrayLike, image_size: tuple[int, int]) -> NDArray[np.float64]:
    corners = _numbers("box", box)
    if corners.shape not in ((4,), (1, 4)):
        raise ValueError(f"box: expected shape (4,) as x0, y0, x1, y1, got {corners.shape}")
    corners = corners.reshape(4)
    _require_finite("box", corners)
    x0, y0, x1, y1 = corners
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"box: expected x0 < x1 and y0 < y1, got {corners.tolist()}")
    height, width = image_size
    # Detectors overshoot a little.
    if (corners >= -0.05).all() and (corners <= 1.05).all() and max(image_size) > 1:
        pixels = (corners * (width, height, width, height)).round(1).tolist()
        raise ValueError(
            f"box: expected pixels, got {corners.tolist()}, which looks normalised; in pixels it would be {pixels}"
        )
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise ValueError(f"box: expected a box that meets the {width} x {height} picture, got {corners.tolist()}")
    return np.clip(corners, 0, (width, height, width, height))


def _check_mask(mask_input: ArrayLike, mask_size: tuple[int, int]) -> NDArray[np.float32]:
    mask = _numbers("mask_input", mask_input)
    if mask.shape != (1, *mask_size):
        raise ValueError(f"mask_input: expected shape {(1, *mask_size)}, low-resolution logits, got {mask.shape}")
    _require_finite("mask_input", mask)
    return mask.astype(np.float32)


def _numbers(name: str, value: Any) -> NDArray[np.float64]:
    """The argument as float64 on the CPU; a list may hold tensors, as detectors give them."""
    try:
        array = np.asarray(_without_tensors(value))
    except ValueError as error:
        raise ValueError(f"{name}: expected a rectangular array, got ragged rows") from error
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected numbers, got {array.dtype} in {type(value).__name__}")
    return array.astype(np.float64)


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"it holds {value.dtype}")
        return value.detach().to("cpu", torch.float64).numpy()
    return [_without_tensors(one) for one in value] if isinstance(value, (list, tuple)) else value


def _require_finite(name: str, array: NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
