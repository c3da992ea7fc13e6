"""Masks of everything in a picture, from a grid of points: SamAutomaticMaskGenerator, for stabilised models too."""

import math
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import MaskData

from stable_sam_cuda.sam.base_models import mask_thresholds
from stable_sam_cuda.sam.predictor import StableSamPredictor

# Names of SamAutomaticMaskGenerator's arguments with the least and the largest value that make sense.
_NUMBERS = {
    "pred_iou_thresh": (0.0, 1.0),
    "stability_score_thresh": (0.0, 1.0),
    "stability_score_offset": (0.0, math.inf),
    "box_nms_thresh": (0.0, 1.0),
    "crop_nms_thresh": (0.0, 1.0),
    "crop_overlap_ratio": (0.0, 1.0),
}
_COUNTS = {
    "points_per_side": 1,
    "points_per_batch": 1,
    "crop_n_layers": 0,
    "crop_n_points_downscale_factor": 1,
    "min_mask_region_area": 0,
}


class StableSamAutomaticMaskGenerator(SamAutomaticMaskGenerator):
    """`segment_anything.SamAutomaticMaskGenerator` by `StableSamPredictor`.

    All points of a picture share what the decoder computes from the picture alone, and half precision works.

    Args:
        model: a SAM, stabilised or not.
        points_per_side: side of the grid of points; None where ``point_grids`` gives the points.
        progress: hears after each batch how many points are done, of how many; a large picture takes minutes.
        **arguments: SamAutomaticMaskGenerator's: ``points_per_batch``, ``pred_iou_thresh``, ``stability_score_thresh``,
            ``stability_score_offset``, ``box_nms_thresh``, ``crop_n_layers``, ``crop_nms_thresh``,
            ``crop_overlap_ratio``, ``crop_n_points_downscale_factor``, ``point_grids``, ``min_mask_region_area``
            (needs opencv) and ``output_mode`` ("binary_mask", "uncompressed_rle" or "coco_rle", which needs
            pycocotools). Without ``pred_iou_thresh`` and ``stability_score_thresh`` those of the model hold
            (`mask_thresholds`): SAM's, 0.88 and 0.95, or lower ones for ``sam_lite``.

    Raises:
        TypeError, ValueError: a wrong argument, by its name.
        ImportError: what an argument needs is not installed.
    """

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        *,
        progress: Callable[[int, int], None] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = StableSamPredictor(model)  # it checks the model
        own = dict(zip(("pred_iou_thresh", "stability_score_thresh"), mask_thresholds(model), strict=True))
        arguments = own | {name: value for name, value in arguments.items() if value is not None or name not in own}
        given = arguments if points_per_side is None else {"points_per_side": points_per_side, **arguments}
        for name, value in given.items():
            if name in _NUMBERS:
                _check_number(name, value, *_NUMBERS[name])
            elif name in _COUNTS:
                _check_count(name, value, _COUNTS[name])
        if (points_per_side is None) == (arguments.get("point_grids") is None):
            raise ValueError("points_per_side: expected a number, or None and point_grids, got both or neither")
        modes = ("binary_mask", "uncompressed_rle", "coco_rle")
        if (mode := arguments.get("output_mode", modes[0])) not in modes:
            raise ValueError(f"output_mode: expected one of {', '.join(modes)}, got {mode!r}")
        if (grids := arguments.get("point_grids")) is not None:
            layers = arguments.get("crop_n_layers", 0) + 1
            if len(grids) < layers:
                raise ValueError(f"point_grids: expected {layers}, one a layer of crops and one more, got {len(grids)}")
            for layer, grid in enumerate(grids):
                _check_grid(f"point_grids[{layer}]", grid)
        super().__init__(model, points_per_side, **arguments)
        self.predictor = predictor
        self.progress = progress
        self._done = self._total = 0  # points, of the picture in work

    def generate(self, image: NDArray[np.uint8] | Image.Image | str | PathLike[str]) -> list[dict[str, Any]]:
        """Masks of a picture, as SamAutomaticMaskGenerator's records; what `StableSamPredictor.set_image` takes.

        Each has segmentation, area, bbox (x, y, width, height), predicted_iou, point_coords, stability_score and
        crop_box.

        Raises:
            TypeError, ValueError, OSError: as `StableSamPredictor.set_image`.
        """
        pixels = self.predictor.pixels_of(image)
        self._done, self._total = (
            0,
            sum(4**layer * len(self.point_grids[layer]) for layer in range(self.crop_n_layers + 1)),
        )
        return super().generate(pixels)

    def _process_crop(self, *arguments: Any) -> MaskData:
        data = super()._process_crop(*arguments)
        data["crop_boxes"] = data["crop_boxes"].reshape(-1, 4)  # of no mask, too
        return data

    def _process_batch(self, points: NDArray[Any], *arguments: Any) -> MaskData:
        data = super()._process_batch(points, *arguments)
        self._done += len(points)
        if self.progress is not None:
            self.progress(self._done, self._total)
        return data


def _check_grid(name: str, grid: object) -> None:
    points = np.asarray(grid)
    if points.dtype.kind not in "iuf" or points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"{name}: expected points (N, 2), N at least 1, got {points.dtype} of shape {points.shape}")
    if not ((points >= 0) & (points <= 1)).all():
        raise ValueError(f"{name}: expected x and y from 0 to 1, parts of the picture, got others")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number from {least:g} to {most:g}, got {value}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
