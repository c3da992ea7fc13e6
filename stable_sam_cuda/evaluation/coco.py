"""COCO's mean average precision of masks prompted with boxes, exact or of a given IoU with the truth.

The paper's protocol: every object that is no crowd is prompted with a box, the mask gets the object's category. What
score it gets the paper does not say, and it decides which of two masks on one object counts: here both a score of 1
for all and the model's own predicted IoU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_tools
from torch import Tensor

from stable_sam_cuda.evaluation.protocol import PROMPTS_A_PASS
from stable_sam_cuda.picture import read_picture
from stable_sam_cuda.sam.predictor import StableSamPredictor
from stable_sam_cuda.training.coco_images import Annotation, CocoImage
from stable_sam_cuda.training.prompts import boxes_in_iou_band
from stable_sam_cuda.training.rts import BAND_KINDS
from stable_sam_cuda.training.samples import Sample
from stable_sam_cuda.training.seeds import seed_of

BOX_BANDS = {"gt_box": None, **BAND_KINDS}  # prompt kinds whose masks can be judged so, and the IoU of their boxes
STATISTICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
Detection = dict[str, Any]


def precision_by_kind(
    predictor: StableSamPredictor,
    samples: Sequence[Sample],
    kinds: Sequence[str],
    *,
    seed: int = 0,
    progress: Callable[[CocoImage], None] = lambda image: None,
) -> dict[str, dict[str, dict[str, float]]]:
    """`average_precision` for each of ``kinds`` that is in `BOX_BANDS`: kind -> score -> statistic -> percent.

    Raises:
        ValueError: a sample is no picture of a COCO file, or as `segment_boxes`.
        OSError: a picture cannot be read.
    """
    images = [sample for sample in samples if isinstance(sample, CocoImage)]
    if len(images) < len(samples):
        raise ValueError(
            f"data: expected pictures of a COCO file, got {len(samples) - len(images)} of {len(samples)} without one"
        )
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
        predictor.set_image(np.asarray(read_picture(image.image)))
        boxes = torch.stack([_true_box(image, annotation) for annotation in image.annotations])
        if band is not None:
            generator = torch.Generator().manual_seed(seed_of(seed, image.name, band))
            # COCO's boxes reach from the edge of a pixel to the edge of a pixel: up to the width, not the last index.
            boxes = boxes_in_iou_band(boxes, image.height + 1, image.width + 1, *band, generator)
        masks, scores = _predict(predictor, boxes, (image.height, image.width))
        runs = mask_tools.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        for annotation, segmentation, score in zip(image.annotations, runs, scores.tolist(), strict=True):
            found = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
            detections.append({**found, "segmentation": segmentation, "score": score})
        progress(image)
    return detections


def _true_box(image: CocoImage, annotation: Annotation) -> Tensor:
    """The annotation's box (4,) as x0, y0, x1, y1."""
    if len(annotation.get("bbox", ())) != 4:
        number = annotation.get("id")
        raise ValueError(f"{image.name}: annotation {number}: expected a bbox of four, got {annotation.get('bbox')}")
    x, y, width, height = annotation["bbox"]
    return torch.tensor([x, y, x + width, y + height], dtype=torch.float32)


def _predict(predictor: StableSamPredictor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks (K, H, W) bool and predicted IoU (K,), on the CPU."""
    boxes = predictor.transform.apply_boxes_torch(boxes, size).to(predictor.device)
    masks, scores = [], []
    for part in boxes.split(PROMPTS_A_PASS):
        found, score, _ = predictor.predict_torch(None, None, part, multimask_output=False)
        masks.append(found[:, 0].cpu())
        scores.append(score[:, 0].cpu())
    return torch.cat(masks), torch.cat(scores)


def average_precision(images: Sequence[CocoImage], detections: Sequence[Detection]) -> dict[str, dict[str, float]]:
    """COCO's average precision of masks, in percent, by score: ``score_1`` for all masks, and ``predicted_iou``.

    Masks that fall on a crowd count neither for nor against the model, as COCO has it. Each is `STATISTICS`: the mean
    over IoU thresholds 0.50 to 0.95, at 0.50, at 0.75, and for COCO's three sizes of objects; NaN where there is no
    such object.

    Args:
        images: the pictures that were segmented; their objects are the truth.
        detections: results in COCO's format, as `segment_boxes` gives them.
    """
    return {
        "score_1": _statistics(images, [{**detection, "score": 1.0} for detection in detections]),
        "predicted_iou": _statistics(images, detections),
    }


def _statistics(images: Sequence[CocoImage], detections: Sequence[Detection]) -> dict[str, float]:
    truth = COCO(_truth(images))
    # loadRes writes into the entries it is given.
    evaluation = COCOeval_faster(truth, truth.loadRes([dict(detection) for detection in detections]), iouType="segm")
    evaluation.run()
    values = [float(value) for value in evaluation.stats[: len(STATISTICS)]]
    return {name: float("nan") if value < 0 else 100 * value for name, value in zip(STATISTICS, values, strict=True)}


def _truth(images: Sequence[CocoImage]) -> dict[str, Any]:
    """The objects of ``images`` as a COCO file's content, numbered anew, with the fields that COCO's tools need."""
    annotations: list[Annotation] = []
    for image in images:
        for place, annotation in enumerate(image.annotations):
            area = annotation.get("area") or float(image.mask(place).sum())
            annotations.append({**annotation, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
        annotations += [{**crowd, "id": len(annotations) + number} for number, crowd in enumerate(image.crowds, 1)]
    categories = sorted({annotation["category_id"] for annotation in annotations})
    sizes = {"images": [_entry(image) for image in images]}
    return {**sizes, "annotations": annotations, "categories": [{"id": one, "name": str(one)} for one in categories]}


def _entry(image: CocoImage) -> dict[str, int]:
    return {"id": image.annotations[0]["image_id"], "height": image.height, "width": image.width}
