"""Prompts drawn from object masks: exact, jittered and noisy boxes, boxes of a given IoU, points, coarse masks.

RTS, the paper's robust training strategy, draws the prompts of each picture of a step of one kind, by a `PromptMix`.

Functions of masks and boxes are vectorised over K objects, take masks (K, H, W) bool and boxes (K, 4) as
x0, y0, x1, y1 in pixel indices (both ends inside the object), and draw from the ``generator`` given.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

JITTER_STD = 0.1  # SAM: standard deviation of the jitter, as a fraction of the box side ...
JITTER_MAX = 20 / 1024  # ... and its bound, as a fraction of the input size
NOISE_SCALE = 0.4  # Stable-SAM's and HQ-SAM's noisy box
BAND_ROUNDS, BAND_CANDIDATES = 8, 8  # of rejection sampling; 3 to 4 of 10 noisy boxes lie in the paper's bands

# Coarse masks, in units of the square root of the object's area, of the blurred mask, and of mask logits.
COARSE_BLUR = (0.04, 0.15)  # standard deviation
COARSE_LEVEL = (0.25, 0.75)  # the blurred mask is cut there: above 1/2 erodes the object, below dilates it
COARSE_NOISE = 0.2  # standard deviation of the level along the outline
COARSE_LIMIT = 10.0  # of the logits, about that of SAM's own in the middle of a sure object
COARSE_STRIDE = 4  # the outline is drawn on a grid coarser than the logits by this factor
COARSE_WAVES = 6  # cells of the outline's noise, along each side of the frame


@dataclass
class PromptBatch:
    """K prompts of one kind, in pixels of SAM's input frame.

    image_index (K,): which embedding each prompt belongs to. points (K, P, 2) with labels (K, P), 1 object,
    0 background; boxes (K, 4); masks (K, 1, 4h, 4w) logits. Any of the last three kinds may be None.
    """

    image_index: Tensor
    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def to(self, device: torch.device) -> "PromptBatch":
        """The same prompts on another device."""
        optional = (self.points, self.labels, self.boxes, self.masks)
        moved = (value if value is None else value.to(device) for value in optional)
        return PromptBatch(self.image_index.to(device), *moved)


def boxes_from_masks(masks: Tensor) -> Tensor:
    """Tight boxes (K, 4) float32 of masks (K, H, W).

    Raises:
        ValueError: a mask is empty, so that it has no box.
    """
    rows, columns = masks.any(2), masks.any(1)
    if not bool(rows.any(1).all()):
        empty = (~rows.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"masks: expected at least one pixel in each mask, got empty masks at {empty}")

    def extent(line: Tensor) -> tuple[Tensor, Tensor]:
        first = line.int().argmax(1)
        last = line.shape[1] - 1 - line.flip(1).int().argmax(1)
        return first, last

    (x0, x1), (y0, y1) = extent(columns), extent(rows)
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def jittered_boxes(boxes: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """SAM's own training jitter: normal noise of 10 % of the side, at most 20 px of 1024."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    limit = JITTER_MAX * max(height, width)
    noise = torch.randn(boxes.shape, generator=generator).to(boxes.device)
    noise = (noise * JITTER_STD * sides).clamp(-limit, limit)
    return _clipped(boxes + noise, height, width)


def noisy_boxes(
    boxes: Tensor, height: int, width: int, generator: torch.Generator, scale: float = NOISE_SCALE
) -> Tensor:
    """HQ-SAM's sloppy boxes: the centre moves by up to ``scale / 2`` of a side, the sides change by up to ``scale``."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    noise = torch.rand(boxes.shape, generator=generator) * 2 - 1
    centre = centre + noise[:, :2] * scale * size / 2
    half = size * (1 + noise[:, 2:] * scale) / 2
    return _clipped(torch.cat([centre - half, centre + half], dim=1), height, width)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes (..., 4) with boxes (..., 4) of an area above zero, coordinates being those of corners."""
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    areas = [(some[..., 2:] - some[..., :2]).prod(-1) for some in (boxes, others)]
    return intersection / (areas[0] + areas[1] - intersection)


def boxes_in_iou_band(
    boxes: Tensor,
    height: int,
    width: int,
    low: float,
    high: float,
    generator: torch.Generator,
    scale: float = NOISE_SCALE,
) -> Tensor:
    """Noisy boxes whose IoU with ``boxes`` lies in [low, high] (the paper's COCO protocol): rejection sampling.

    Where `BAND_ROUNDS` rounds of `BAND_CANDIDATES` noisy boxes hold none in the band, which happens to objects of
    few pixels at the picture's rim, a part of the box is taken whose area is that IoU, anywhere inside the box.

    Args:
        boxes: (K, 4); a side shorter than one pixel counts as one pixel.

    Raises:
        ValueError: the band is not within (0, 1), or the picture is less than 2 pixels wide or high.
    """
    if not 0 < low < high < 1:
        raise ValueError(f"low, high: expected 0 < low < high < 1, got {low} and {high}")
    if min(height, width) < 2:
        raise ValueError(f"height, width: expected a picture of at least 2 x 2 pixels, got {height} x {width}")
    truth = _clipped(boxes, height, width)
    chosen = _part_of_boxes(truth, low, high, generator)
    missing = torch.arange(len(boxes))
    for _ in range(BAND_ROUNDS):
        if not len(missing):
            break
        wanted = truth[missing].repeat_interleave(BAND_CANDIDATES, 0)
        candidates = noisy_boxes(wanted, height, width, generator, scale)
        overlap = box_iou(candidates, wanted)
        fits = ((overlap >= low) & (overlap <= high)).view(-1, BAND_CANDIDATES)
        found, first = fits.any(1), fits.int().argmax(1)
        chosen[missing[found]] = candidates.view(-1, BAND_CANDIDATES, 4)[found, first[found]]
        missing = missing[~found]
    return chosen


def _part_of_boxes(boxes: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """A part of each box that covers a fraction of it between low and high, drawn uniformly."""
    random = torch.rand(len(boxes), 4, generator=generator)
    # The outer twentieths stay unused, so that rounding cannot leave the band.
    fraction = low + (high - low) * (0.05 + 0.9 * random[:, :1])
    share = torch.cat([fraction ** random[:, 1:2], fraction ** (1 - random[:, 1:2])], dim=1)
    size = boxes[:, 2:] - boxes[:, :2]
    corner = boxes[:, :2] + random[:, 2:] * (1 - share) * size
    return torch.cat([corner, corner + share * size], dim=1)


def _clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes inside the picture, each side at least one pixel long."""
    low, high = boxes.minimum(boxes.roll(2, 1))[:, :2], boxes.maximum(boxes.roll(2, 1))[:, 2:]
    limit = boxes.new_tensor([width - 1, height - 1])
    low = low.clamp(min=0).minimum((limit - 1).clamp(min=0))
    high = high.minimum(limit).maximum((low + 1).minimum(limit))
    return torch.cat([low, high], dim=1)


def points_in_masks(masks: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` pixels drawn uniformly, with replacement, from each mask: (K, count, 2) as x, y.

    Raises:
        ValueError: a mask is empty.
    """
    flat = masks.flatten(1)
    sums = flat.cumsum(1)
    totals = sums[:, -1:]
    if bool((totals == 0).any()):
        raise ValueError("masks: expected at least one pixel in each mask, got an empty mask")
    random = torch.rand(len(masks), count, generator=generator).to(masks.device)
    ranks = (random * totals).floor().long() + 1
    index = torch.searchsorted(sums, ranks)
    width = masks.shape[2]
    return torch.stack([index % width, index // width], dim=2).float()


def coarse_masks(masks: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Logits (K, 1, h, w) for SAM's mask input: each mask eroded or dilated, its outline smoothed and wavy.

    The mask is blurred in proportion to the object's size and cut at a random level that wanders along the outline.
    Every result keeps at least one pixel above zero.

    Args:
        masks: (K, H, W); padded at the bottom and on the right to a square, SAM's input frame.
        size: h, w of SAM's mask input: 256, 256, or ``sam.prompt_encoder.mask_input_size``.

    Raises:
        ValueError: a mask is empty.
    """
    if not bool(masks.flatten(1).any(1).all()):
        raise ValueError("masks: expected at least one pixel in each mask, got an empty mask")
    count, height, width = masks.shape
    side = max(height, width)
    framed = F.pad(masks.float(), (0, side - width, 0, side - height))
    grid = (max(1, size[0] // COARSE_STRIDE), max(1, size[1] // COARSE_STRIDE))
    coverage = F.adaptive_avg_pool2d(framed[:, None], grid)
    random = torch.rand(2, count, 1, 1, 1, generator=generator)
    blur, level = (
        low + (high - low) * part for part, (low, high) in zip(random, (COARSE_BLUR, COARSE_LEVEL), strict=True)
    )
    blurred = _blurred(coverage, blur.flatten() * coverage.flatten(1).sum(1).sqrt())
    waves = torch.randn(count, 1, COARSE_WAVES, COARSE_WAVES, generator=generator) * COARSE_NOISE
    waves = F.interpolate(waves, grid, mode="bicubic", align_corners=False)
    blurred = F.interpolate(blurred, size, mode="bilinear", align_corners=False)
    waves = F.interpolate(waves, size, mode="bilinear", align_corners=False)
    # Of a thin object the blur leaves low values, so levels are relative to the peak.
    peak = blurred.amax((2, 3), keepdim=True)
    relative = blurred / peak
    field = relative - level + waves * 4 * relative * (1 - relative)
    field = field + (0.05 - field.amax((2, 3), keepdim=True)).clamp(min=0)
    # Inside and outside are as sure of themselves at any level.
    field = torch.where(field > 0, field / (1 - level), field / level)
    return COARSE_LIMIT * (1.25 * field).clamp(-1, 1)


def _blurred(images: Tensor, deviations: Tensor) -> Tensor:
    """Images (K, 1, h, w), each blurred by a Gaussian of its own standard deviation (K,), in pixels."""
    radius = int((2.5 * deviations.max()).ceil())
    steps = torch.arange(-radius, radius + 1)
    kernels = (-(steps / deviations.clamp(min=0.3)[:, None]).square() / 2).exp()
    kernels = (kernels / kernels.sum(1, keepdim=True))[:, None]
    stacked = images.transpose(0, 1)
    across = F.conv2d(stacked, kernels[:, :, None, :], padding=(0, radius), groups=len(images))
    return F.conv2d(across, kernels[:, :, :, None], padding=(radius, 0), groups=len(images)).transpose(0, 1)


@dataclass(frozen=True)
class PromptMix:
    """Relative frequencies of the prompt kinds. The paper names the first five, not their frequencies."""

    gt_box: float = 0.5
    noisy_box: float = 3.0
    one_point: float = 2.0
    three_points: float = 0.5
    ten_points: float = 0.5
    box_50_60: float = 0.0
    box_60_70: float = 0.0
    coarse_mask: float = 0.0

    def kinds(self) -> tuple[list[str], list[float]]:
        """The kinds that occur, and their frequencies."""
        occurring = {kind: frequency for kind, frequency in vars(self).items() if frequency}
        return list(occurring), list(occurring.values())

    @classmethod
    def parsed(cls, text: str) -> "PromptMix":
        """``"noisy_box=4,gt_box=1"``: kinds by commas; a kind that is not named does not occur.

        Raises:
            ValueError: ``text`` is something else, a kind is unknown or named twice, or no frequency is above 0.
        """
        expected = f"mix: expected KIND=FREQUENCY by commas, KIND of {', '.join(vars(cls()))}, got {text!r}"
        frequencies: dict[str, float] = dict.fromkeys(vars(cls()), 0.0)
        named = set()
        for part in text.split(","):
            kind, _, number = part.strip().partition("=")
            try:
                frequency = float(number)
            except ValueError:
                raise ValueError(expected) from None
            if kind not in frequencies or kind in named:
                raise ValueError(expected)
            if not (math.isfinite(frequency) and frequency >= 0):
                raise ValueError(f"mix: expected finite frequencies of at least 0, got {part.strip()}")
            frequencies[kind] = frequency
            named.add(kind)
        if not any(frequencies.values()):
            raise ValueError(f"mix: expected a frequency above 0, got {text!r}")
        return cls(**frequencies)


ROBUST = PromptMix()
GOOD_BOX_ONLY = PromptMix(gt_box=1, noisy_box=0, one_point=0, three_points=0, ten_points=0)
POINT_KINDS = {"one_point": 1, "three_points": 3, "five_points": 5, "ten_points": 10}
BAND_KINDS = {"box_50_60": (0.5, 0.6), "box_60_70": (0.6, 0.7)}  # IoU with the exact box
PROMPT_KINDS = ("gt_box", "noisy_box", *BAND_KINDS, *POINT_KINDS, "coarse_mask")


def draw_kind(mix: PromptMix, generator: torch.Generator) -> str:
    """One prompt kind, by the mix's frequencies."""
    kinds, frequencies = mix.kinds()
    return kinds[int(torch.multinomial(torch.tensor(frequencies, dtype=torch.float), 1, generator=generator))]


def joined_prompts(batches: list[PromptBatch]) -> PromptBatch:
    """Batches of one prompt kind as one, in their order."""
    fields: dict[str, Any] = {}
    for name in vars(batches[0]):
        values = [getattr(batch, name) for batch in batches]
        fields[name] = None if values[0] is None else torch.cat(values)
    return PromptBatch(**fields)


def draw_prompts(
    kind: str,
    masks: Tensor,
    image_index: Tensor,
    generator: torch.Generator,
    extent: tuple[int, int] | None = None,
    mask_size: tuple[int, int] = (256, 256),
) -> PromptBatch:
    """Prompts of one kind for masks (K, S, S) bool in SAM's input frame.

    Args:
        kind: one of `PROMPT_KINDS`.
        extent: height and width of the picture inside the frame, to which noisy boxes are clipped.
        mask_size: height and width of SAM's mask input, ``sam.prompt_encoder.mask_input_size``.

    Raises:
        ValueError: the kind is unknown, or a mask is empty.
    """
    height, width = extent or masks.shape[-2:]
    if kind == "gt_box":
        return PromptBatch(image_index, boxes=boxes_from_masks(masks))
    if kind == "noisy_box":
        return PromptBatch(image_index, boxes=noisy_boxes(boxes_from_masks(masks), height, width, generator))
    if kind in BAND_KINDS:
        boxes = boxes_in_iou_band(boxes_from_masks(masks), height, width, *BAND_KINDS[kind], generator)
        return PromptBatch(image_index, boxes=boxes)
    if kind == "coarse_mask":
        return PromptBatch(image_index, masks=coarse_masks(masks, mask_size, generator))
    if kind in POINT_KINDS:
        points = points_in_masks(masks, POINT_KINDS[kind], generator)
        return PromptBatch(image_index, points=points, labels=torch.ones(points.shape[:2]))
    raise ValueError(f"kind: expected one of {', '.join(PROMPT_KINDS)}, got {kind!r}")
