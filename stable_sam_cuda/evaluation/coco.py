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

from stable_sam_cuda.data import picture
from stable_sam_cuda.data.coco_files import Annotation, annotation_label
from stable_sam_cuda.data.coco_images import CocoImage
from stable_sam_cuda.data.digests import seed_of
from stable_sam_cuda.data.prompts import BAND_KINDS, boxes_in_iou_band
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.data.segmentations import FARTHEST, are_fractions, area_of, box_around, filled
from stable_sam_cuda.evaluation.protocol import PROMPTS_A_PASS
from stable_sam_cuda.extras import missing_extra
from stable_sam_cuda.sam.predictor import StableSamPredictor

try:
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask as mask_tools
except ImportError as error:
    raise ImportError(missing_extra("faster-coco-eval")) from error

BOX_BANDS = {"gt_box": None, **BAND_KINDS}  # prompt kinds whose masks can be judged so, and the IoU of their boxes
STATISTICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
NO_CATEGORY = "annotation left out of the average precision: expected a category_id, got another or none"
BOX_OF_MASK = "expected a bbox of four numbers in pixels, got another or none; the box around the mask is prompted"
TURNED_BOX = "the run lengths are turned to fit their entry, so the box around the mask is prompted, not the bbox"
NO_BOX = "annotation left out of the average precision: expected a bbox or a mask with a pixel in the picture"
Detection = dict[str, Any]


def check_precision(samples: Sequence[Sample], kinds: Sequence[str]) -> list[CocoImage]:
    """The samples as pictures of a COCO file, after a check that `precision_by_kind` can judge them.

    Annotations without a usable category_id are noted, once: they are neither prompted nor part of the truth.

    Raises:
        ValueError: a sample is no picture of a COCO file, two have one image id, none of ``kinds`` is in `BOX_BANDS`,
            or no annotation has a usable category_id.
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
    usable = 0
    for image in images:
        for place, annotation in enumerate(image.annotations + image.crowds):
            if _has_category(annotation):
                usable += place < len(image.annotations)
            else:
                got = reprlib.repr(annotation.get("category_id"))
                image.note_once(NO_CATEGORY, annotation_label(annotation, place), got)
    if images and not usable:
        raise ValueError("data: expected annotations with a category_id, got none")
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
        ValueError, OSError: a picture cannot be read, or the band is not within (0, 1).
    """
    detections = []
    for image in images:
        prompted = _boxes(image)
        places = list(prompted)
        if not places:
            progress(image)
            continue
        tag = image.orientation()
        shown = picture.read_picture(image.image)
        predictor.set_image(np.asarray(shown))
        boxes = torch.stack([_turned(box, image, tag) for box in prompted.values()])
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


def _has_category(annotation: Annotation) -> bool:
    category = annotation.get("category_id")
    whole = isinstance(category, int | str) or (isinstance(category, float) and category.is_integer())
    return whole and not isinstance(category, bool)


def _boxes(image: CocoImage) -> dict[int, Tensor]:
    """The box (4,) to prompt each object with, as x0, y0, x1, y1 in the entry's frame, by its annotation's place.

    It is the annotation's bbox; the box around the mask where that is none, which is noted.

    Raises:
        ValueError, OSError: as `CocoImage.objects`.
    """
    boxes: dict[int, Tensor] = {}
    for place, borders in image.objects().items():
        annotation = image.annotations[place]
        if not _has_category(annotation):
            continue
        given: Any = annotation.get("bbox")
        if (turned := image.is_turned(annotation)) or not _is_box(given):
            around = box_around(borders, image.height, image.width)
            if around is None:
                image.note_once(NO_BOX, annotation_label(annotation, place), reprlib.repr(given))
                continue
            reason, got = (TURNED_BOX, "") if turned else (BOX_OF_MASK, reprlib.repr(given))
            image.note_once(reason, annotation_label(annotation, place), got)
            boxes[place] = torch.tensor(around, dtype=torch.float32)
            continue
        x, y, width, height = given
        boxes[place] = torch.tensor([x, y, x + width, y + height], dtype=torch.float32)
    return boxes


def _is_box(box: Any) -> bool:
    if not isinstance(box, list | tuple) or len(box) != 4:
        return False
    sound = all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < FARTHEST for one in box)
    return sound and box[2] >= 0 and box[3] >= 0 and not are_fractions(box)


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
    such object. Objects that cannot be decoded, or have no category, are no part of the truth.

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
        found = image.objects()
        objects = [(image.annotations[place], found[place], 0) for place in _boxes(image)]
        crowds = [(one, borders, 1) for one, borders in image.decoded_crowds() if _has_category(one)]
        for annotation, borders, crowd in objects + crowds:
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
