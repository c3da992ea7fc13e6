"""COCO's mean average precision of masks prompted with boxes, exact or of a given IoU with the truth.

The paper's protocol: every object that is no crowd is prompted with a box, the mask gets the object's category. What
score it gets the paper does not say, and it decides which of two masks on one object counts: here both a score of 1
for all and the model's own predicted IoU.
"""

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stable_sam_cuda import picture
from stable_sam_cuda.evaluation.protocol import PROMPTS_A_PASS
from stable_sam_cuda.extras import missing_extra
from stable_sam_cuda.sam.predictor import StableSamPredictor
from stable_sam_cuda.training.coco_files import Annotation, annotation_label
from stable_sam_cuda.training.coco_images import CocoImage
from stable_sam_cuda.training.prompts import boxes_in_iou_band
from stable_sam_cuda.training.rts import BAND_KINDS
from stable_sam_cuda.training.samples import Sample
from stable_sam_cuda.training.seeds import seed_of
from stable_sam_cuda.training.segmentations import FARTHEST, area_of, filled

try:
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask as mask_tools
except ImportError as error:
    raise ImportError(missing_extra("faster-coco-eval")) from error

BOX_BANDS = {"gt_box": None, **BAND_KINDS}  # prompt kinds whose masks can be judged so, and the IoU of their boxes
STATISTICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
Detection = dict[str, Any]


def check_precision(samples: Sequence[Sample], kinds: Sequence[str]) -> list[CocoImage]:
    """The samples as pictures of a COCO file, after a check that `precision_by_kind` can judge them.

    Raises:
        ValueError: a sample is no picture of a COCO file, two have one image id, none of ``kinds`` is in `BOX_BANDS`,
            or an annotation has no usable bbox or category_id.
    """
    images = [sample for sample in samples if isinstance(sample, CocoImage)]
    if len(images) < len(samples):
        raise ValueError(
            f"data: expected pictures of a COCO file, got {len(samples) - len(images)} of {len(samples)} without one"
        )
    if not any(kind in BOX_BANDS for kind in kinds):
        raise ValueError(f"prompts: expected one or more of {', '.join(BOX_BANDS)}, got {', '.join(kinds) or 'none'}")
    number, count = Counter(_image_id(image) for image in images).most_common(1)[0] if images else (None, 0)
    if count > 1:
        raise ValueError(f"data: expected pictures of one COCO file, got {count} pictures of the id {number!r}")
    for image in images:
        for place in range(len(image.annotations)):
            _box(image, place)
        for place, annotation in enumerate(image.annotations + image.crowds):
            category = annotation.get("category_id")
            if not isinstance(category, int | str) or isinstance(category, bool):
                label = f"{image.name}: {annotation_label(annotation, place)}"
                raise ValueError(f"{label}: expected a category_id, got {reprlib.repr(category)}")
    return images


def precision_by_kind(
    predictor: StableSamPredictor,
    samples: Sequence[Sample],
    kinds: Sequence[str],
    *,
    seed: int = 0,
    progress: Callable[[CocoImage], None] = lambda image: None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """`average_precision` for each of ``kinds`` that is in `BOX_BANDS`: kind -> score -> statistic -> percent.

    Raises:
        ValueError: as `check_precision` and `segment_boxes`.
        OSError: a picture cannot be read.
    """
    images = check_precision(samples, kinds)
    return {
        kind: average_precision(
            images, segment_boxes(predictor, images, band=BOX_BANDS[kind], seed=seed, progress=progress)
        )
        for kind in kinds
        if kind in BOX_BANDS
    }


def segment_boxes(
    predictor: StableSamPredictor,
    images: Sequence[CocoImage],
    *,
    band: tuple[float, float] | None = None,
    seed: int = 0,
    progress: Callable[[CocoImage], None] = lambda image: None,
) -> list[Detection]:
    """The mask of each object of ``images``, prompted with its box, as COCO's results have it.

    Args:
        band: range of the IoU of the prompted boxes with the true ones; None: the true boxes.
        seed: of the boxes, which follow from it and the picture alone, whatever the model.

    Returns:
        One entry an object: image_id, category_id, segmentation (run lengths), score (the predicted IoU).

    Raises:
        ValueError, OSError: a picture cannot be read, the band is not within (0, 1), or an object has no box.
    """
    detections = []
    for image in images:
        places = list(image.objects())
        tag = image.orientation()
        shown = picture.read_picture(image.image)
        predictor.set_image(np.asarray(shown))
        boxes = torch.stack([_turned(_box(image, place), image, tag) for place in places])
        if band is not None:
            generator = torch.Generator().manual_seed(seed_of(seed, image.name, band))
            # COCO's boxes reach from the edge of a pixel to the edge of a pixel: up to the width, not the last index.
            boxes = boxes_in_iou_band(boxes, shown.height + 1, shown.width + 1, *band, generator)
        masks, scores = _predict(predictor, boxes, (shown.height, shown.width))
        runs = mask_tools.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        for place, segmentation, score in zip(places, runs, scores.tolist(), strict=True):
            found = {"image_id": _image_id(image), "category_id": image.annotations[place]["category_id"]}
            detections.append({**found, "segmentation": segmentation, "score": score})
        progress(image)
    return detections


def _image_id(image: CocoImage) -> Any:
    return image.annotations[0]["image_id"]


def _box(image: CocoImage, place: int) -> Tensor:
    """The annotation's box (4,) as x0, y0, x1, y1, in the file's frame.

    Raises:
        ValueError: there is none, or not four finite numbers with a width and a height.
    """
    annotation = image.annotations[place]
    box = annotation.get("bbox")
    label = f"{image.name}: {annotation_label(annotation, place)}"
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise ValueError(f"{label}: expected a bbox of four, got {reprlib.repr(box)}")
    sound = all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < FARTHEST for one in box)
    if not sound or box[2] < 0 or box[3] < 0:
        raise ValueError(
            f"{label}: expected a bbox of four numbers below {FARTHEST:g}, width and height not below 0, "
            f"got {reprlib.repr(box)}"
        )
    x, y, width, height = box
    return torch.tensor([x, y, x + width, y + height], dtype=torch.float32)


def _turned(box: Tensor, image: CocoImage, tag: int) -> Tensor:
    """The box (4,) after the turn of the picture by its EXIF orientation, 1 to 8."""
    x0, y0, x1, y1 = box.tolist()
    if tag in (2, 3, 7, 8):
        x0, x1 = image.width - x1, image.width - x0
    if tag in (3, 4, 6, 7):
        y0, y1 = image.height - y1, image.height - y0
    return torch.tensor([y0, x0, y1, x1] if tag >= 5 else [x0, y0, x1, y1])


def _predict(predictor: StableSamPredictor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks (K, H, W) bool and predicted IoU (K,), on the CPU."""
    boxes = predictor.transform.apply_boxes_torch(boxes, size).to(predictor.device)
    masks, scores = [], []
    for part in boxes.split(PROMPTS_A_PASS):
        found, score, _ = predictor.predict_torch(None, None, part, multimask_output=False)
        masks.append(found[:, 0].cpu())
        scores.append(score[:, 0].cpu())
    return torch.cat(masks), torch.cat(scores)


def average_precision(
    images: Sequence[CocoImage], detections: Sequence[Detection]
) -> dict[str, dict[str, float | None]]:
    """COCO's average precision of masks, in percent, by score: ``score_1`` for all masks, and ``predicted_iou``.

    Masks that fall on a crowd count neither for nor against the model, as COCO has it. Each is `STATISTICS`: the mean
    over IoU thresholds 0.50 to 0.95, at 0.50, at 0.75, and for COCO's three sizes of objects; None where there is no
    such object. Objects whose annotation cannot be decoded are no part of the truth.

    Args:
        images: the pictures that were segmented; their objects are the truth.
        detections: results in COCO's format, as `segment_boxes` gives them.
    """
    truth = _truth(images)
    return {
        "score_1": _statistics(truth, [{**detection, "score": 1.0} for detection in detections]),
        "predicted_iou": _statistics(truth, detections),
    }


@dataclass
class _Truth:
    """A COCO file's content, and the numbers in it of the ids of images and categories."""

    content: dict[str, Any]
    images: dict[Any, int]
    categories: dict[Any, int]


def _statistics(truth: _Truth, detections: Sequence[Detection]) -> dict[str, float | None]:
    # COCO's tools write into the entries that they are given.
    objects = COCO({name: [dict(entry) for entry in entries] for name, entries in truth.content.items()})
    found = [
        {
            **detection,
            "image_id": truth.images[detection["image_id"]],
            "category_id": truth.categories[detection["category_id"]],
        }
        for detection in detections
    ]
    evaluation = COCOeval_faster(objects, objects.loadRes(found), iouType="segm")
    evaluation.run()
    values = [float(value) for value in evaluation.stats[: len(STATISTICS)]]
    return {name: 100 * value if value >= 0 else None for name, value in zip(STATISTICS, values, strict=True)}


def _truth(images: Sequence[CocoImage]) -> _Truth:
    """The objects of ``images``, numbered anew, with the fields that COCO's tools need."""
    numbers = {_image_id(image): number for number, image in enumerate(images, 1)}
    annotations: list[Annotation] = []
    entries = []
    for image in images:
        tag = image.orientation()
        height, width = (image.width, image.height) if tag >= 5 else (image.height, image.width)
        number = numbers[_image_id(image)]
        entries.append({"id": number, "height": height, "width": width})
        objects = [(image.annotations[place], borders, 0) for place, borders in image.objects().items()]
        for annotation, borders, crowd in objects + [(one, borders, 1) for one, borders in image.decoded_crowds()]:
            area = annotation.get("area")
            if not isinstance(area, int | float) or isinstance(area, bool) or not 0 < area < math.inf:
                area = area_of(borders)
            mask = picture.turn(filled(borders, image.height, image.width), tag)
            runs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
            fields = {"image_id": number, "category_id": annotation.get("category_id"), "segmentation": runs}
            annotations.append({"id": len(annotations) + 1, **fields, "area": float(area), "iscrowd": crowd})
    categories = {
        name: number for number, name in enumerate(dict.fromkeys(one["category_id"] for one in annotations), 1)
    }
    for annotation in annotations:
        annotation["category_id"] = categories[annotation["category_id"]]
    listed = [{"id": number, "name": str(name)} for name, number in categories.items()]
    return _Truth({"images": entries, "annotations": annotations, "categories": listed}, numbers, categories)
