"""Masks of everything in a picture, from a grid of points: SamAutomaticMaskGenerator, for stabilised models too."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

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
        **arguments: SamAutomaticMaskGenerator's: ``points_per_batch``, ``pred_iou_thresh``, ``stability_score_thresh``,
            ``stability_score_offset``, ``box_nms_thresh``, ``crop_n_layers``, ``crop_nms_thresh``,
            ``crop_overlap_ratio``, ``crop_n_points_downscale_factor``, ``point_grids``, ``min_mask_region_area``
            (needs opencv) and ``output_mode`` ("binary_mask", "uncompressed_rle" or "coco_rle", which needs
            pycocotools).

    Raises:
        TypeError, ValueError: a wrong argument, by its name.
        ImportError: what an argument needs is not installed.
    """

    def __init__(self, model: Sam, points_per_side: int | None = 32, **arguments: Any) -> None:
        predictor = StableSamPredictor(model)  # it checks the model
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
        super().__init__(model, points_per_side, **arguments)
        self.predictor = predictor

    def generate(self, image: NDArray[np.uint8]) -> list[dict[str, Any]]:
        """Masks of a picture (H, W, 3), uint8 RGB, as SamAutomaticMaskGenerator's records.

        Each has segmentation, area, bbox (x, y, width, height), predicted_iou, point_coords, stability_score and
        crop_box.

        Raises:
            TypeError, ValueError: as `StableSamPredictor.set_image`.
        """
        self.predictor.check_image(image)
        return super().generate(image)


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
