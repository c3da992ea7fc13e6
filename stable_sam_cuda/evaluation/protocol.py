"""The paper's protocol: many random prompts of a kind for each object; overlap with the truth, and stability."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.data.dataset import object_masks
from stable_sam_cuda.data.digests import seed_of
from stable_sam_cuda.data.prompts import draw_prompts
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.evaluation.metrics import boundary_iou, mask_iou, stability
from stable_sam_cuda.sam.predictor import StableSamPredictor
from stable_sam_cuda.sam.stable_block import stable_blocks_of

KIND_NAMES = {
    "gt_box": "gt_box",
    "noisy_box": "noisy_box",
    "1_point": "one_point",
    "3_points": "three_points",
    "5_points": "five_points",
    "10_points": "ten_points",
    "box_50_60": "box_50_60",
    "box_60_70": "box_60_70",
    "coarse_mask": "coarse_mask",
}
PROMPTS_A_PASS = 20


@dataclass(frozen=True)
class ObjectResult:
    """One object, one prompt kind: means over the draws of IoU and boundary IoU, and their stability ST, in [0, 1]."""

    set_name: str
    picture: str
    object_index: int
    area: float  # of the picture
    kind: str
    draws: int
    iou: float
    boundary_iou: float
    stability: float
    alpha_1: float | None = None  # mean of the router's first weight over the draws; None without a router


def check_protocol(kinds: Sequence[str], draws: int) -> None:
    """Refuse what `evaluate` cannot do.

    Raises:
        ValueError: there is no prompt kind, one is unknown or named twice, or there is less than one draw.
    """
    if not kinds:
        raise ValueError(f"prompts: expected some of {', '.join(KIND_NAMES)}, got none")
    for place, kind in enumerate(kinds):
        if kind not in KIND_NAMES:
            raise ValueError(f"prompts: expected some of {', '.join(KIND_NAMES)}, got {kind!r}")
        if kind in kinds[:place]:
            raise ValueError(f"prompts: expected each kind once, got {kind} twice")
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")


@torch.inference_mode()
def evaluate(
    predictor: StableSamPredictor,
    samples: Sequence[Sample],
    kinds: Sequence[str],
    *,
    draws: int = 20,
    seed: int = 0,
    progress: Callable[[Sample], None] = lambda sample: None,
) -> list[ObjectResult]:
    """Segment every object of ``samples`` with ``draws`` prompts of each kind (the GT box is always the same: one).

    Prompts follow from the seed, the picture's name and the object's index alone, so that every model is asked the
    same, in whatever order and on however many processes. Masks are compared at the picture's own size.

    Raises:
        ValueError: as `check_protocol`.
    """
    check_protocol(kinds, draws)
    results = []
    with recorded_routing(predictor.model) as routing:
        for sample in samples:
            image, ids = sample.load()
            predictor.set_image(image)
            for index, mask in enumerate(object_masks(ids)):
                target = torch.from_numpy(mask)
                for kind in kinds:
                    count = 1 if kind == "gt_box" else draws
                    predicted = _predict(predictor, target, kind, count, seed_of(seed, sample.name, index, kind))
                    overlap, outline = mask_iou(predicted, target), boundary_iou(predicted, target)
                    results.append(
                        ObjectResult(
                            sample.set_name, sample.name, index, float(mask.mean()), kind, count,
                            overlap.mean().item(), outline.mean().item(), stability(predicted).item(), routing.take(),
                        )
                    )  # fmt: skip
            progress(sample)
    return results


class RouterRecord:
    """alpha_1 in the decoder's last block, of the prompts since the last `take`; ``blocks`` ask the router in turn."""

    def __init__(self, blocks: int = 1) -> None:
        self.blocks = blocks
        self._calls = 0
        self._batches: list[Tensor] = []

    def add(self, alpha: Tensor) -> None:
        """Alpha (B, 2) of B prompts, as the router returns it to one block after the other."""
        self._calls += 1
        if self._calls % self.blocks == 0:
            self._batches.append(alpha.detach()[:, 0].float())

    def take(self) -> float | None:
        """The mean alpha_1 of what was recorded, which is then forgotten; None where no router has run."""
        batches, self._batches = self._batches, []
        prompts = sum(len(batch) for batch in batches)
        return sum(batch.sum().item() for batch in batches) / prompts if prompts else None


@contextmanager
def recorded_routing(sam: Sam) -> Iterator[RouterRecord]:
    """Record the router of ``sam``'s plugin; of a plain SAM, or a plugin without router, nothing."""
    blocks = stable_blocks_of(sam)
    record = RouterRecord(max(1, len(blocks)))
    router = blocks[-1].plugin.router if blocks else None
    hook = None if router is None else router.register_forward_hook(lambda _module, _inputs, alpha: record.add(alpha))
    try:
        yield record
    finally:
        if hook is not None:
            hook.remove()


def _predict(predictor: StableSamPredictor, target: Tensor, kind: str, count: int, seed: int) -> Tensor:
    """Masks (count, H, W) bool on the CPU, one a prompt."""
    generator = torch.Generator().manual_seed(seed)
    masks = target.expand(count, -1, -1)
    mask_size = predictor.model.prompt_encoder.mask_input_size
    first = torch.zeros(count, dtype=torch.long)
    prompts = draw_prompts(KIND_NAMES[kind], masks, first, generator, mask_size=mask_size)
    size = tuple(target.shape)
    transform, device = predictor.transform, predictor.device
    points = None if prompts.points is None else transform.apply_coords_torch(prompts.points, size).to(device)
    labels = None if prompts.labels is None else prompts.labels.to(device)
    boxes = None if prompts.boxes is None else transform.apply_boxes_torch(prompts.boxes, size).to(device)
    logits = None if prompts.masks is None else prompts.masks.to(device)
    parts = []
    for start in range(0, count, PROMPTS_A_PASS):
        part = slice(start, start + PROMPTS_A_PASS)
        found, _, _ = predictor.predict_torch(
            None if points is None else points[part],
            None if labels is None else labels[part],
            None if boxes is None else boxes[part],
            None if logits is None else logits[part],
            multimask_output=False,
        )
        parts.append(found[:, 0].cpu())
    return torch.cat(parts)


def summarize(results: Sequence[ObjectResult]) -> dict[str, dict[str, dict[str, float]]]:
    """kind -> set -> mIoU, mBIoU and ST in percent, and alpha_1 where there is a router; among the sets ``all``
    (each picture counts once) and ``sets`` (each set counts once).

    A picture counts by the mean over its objects, a set by the mean over its pictures, as HQ-SAM has it.
    """
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for kind in dict.fromkeys(result.kind for result in results):
        pictures: dict[str, dict[str, list[ObjectResult]]] = {}
        for result in results:
            if result.kind == kind:
                pictures.setdefault(result.set_name, {}).setdefault(result.picture, []).append(result)
        by_set = {name: [_means(objects) for objects in found.values()] for name, found in pictures.items()}
        means = {name: np.mean(values, axis=0) for name, values in by_set.items()}
        means["sets"] = np.mean(list(means.values()), axis=0)
        means["all"] = np.mean([value for values in by_set.values() for value in values], axis=0)
        summary[kind] = {name: _figures(values) for name, values in means.items()}
    return summary


def _means(objects: Sequence[ObjectResult]) -> np.ndarray:
    unrouted = float("nan")
    rows = [
        (one.iou, one.boundary_iou, one.stability, unrouted if one.alpha_1 is None else one.alpha_1) for one in objects
    ]
    return np.mean(rows, axis=0)


def _figures(means: np.ndarray) -> dict[str, float]:
    figures = dict(zip(("miou", "mbiou", "st"), (100 * means[:3]).round(2).tolist(), strict=True))
    return figures if np.isnan(means[3]) else {**figures, "alpha_1": round(float(means[3]), 4)}
