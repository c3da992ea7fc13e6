"""Boxes and points from the command line, checked against the photograph."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

BOX_FORMATS = {"xyxy": "four numbers X0 Y0 X1 Y1", "xywh": "four numbers X Y WIDTH HEIGHT (--box-format xywh)"}
POINT_FORM = "two numbers X Y, or X Y:0 for background"
SMALLEST_BOX = 2.0  # pixels of its longer side

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ObjectPrompt:
    """What is known of one object: a box, points, or both; pixels of the photograph.

    ``box`` is (x0, y0, x1, y1); ``points`` are (x, y) with ``labels`` 1 for the object, 0 for background.
    """

    box: Box | None = None
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Sequence]:
        """As `StableSamPredictor.predict` takes it."""
        arguments: dict[str, Sequence] = {}
        if self.box is not None:
            arguments["box"] = self.box
        if self.points:
            arguments |= {"point_coords": self.points, "point_labels": self.labels}
        return arguments


def words_of(text: str) -> list[str]:
    """The words of an option's value, parted by spaces or commas; two commas have an empty word between them."""
    return re.split(r"\s*,\s*|\s+", text.strip()) if text.strip() else []


def spelled(numbers: Sequence[float]) -> str:
    """Numbers as they are typed."""
    return " ".join(f"{number:g}" for number in numbers)


def parse_numbers(option: str, form: str, text: str, count: int) -> list[float]:
    """``count`` finite numbers from a value.

    Raises:
        ValueError: naming the option, its form and the words that came.
    """
    words = words_of(text)
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(f"{option}: expected {form}, got {text!r}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{option}: expected finite numbers, got {text!r}")
    return numbers


def parse_box(text: str, box_format: str = "xyxy") -> Box:
    """A box (x0, y0, x1, y1) with x0 < x1 and y0 < y1, from a value in a format of `BOX_FORMATS`."""
    x0, y0, x1, y1 = parse_numbers("--box", BOX_FORMATS[box_format], text, 4)
    if box_format == "xywh":
        if x1 <= 0 or y1 <= 0:
            raise ValueError(f"--box: expected WIDTH and HEIGHT above 0 (--box-format xywh), got {text!r}")
        return x0, y0, x0 + x1, y0 + y1
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"--box: expected X0 < X1 and Y0 < Y1, got {text!r}")
    return x0, y0, x1, y1


def parse_point(text: str) -> tuple[float, float, int]:
    """``"x y"``, ``"x y:1"`` or ``"x y:0"`` as (x, y, label)."""
    coordinates, colon, label = text.partition(":")
    words = words_of(text)
    if not colon and len(words) == 3 and words[2] in ("0", "1"):
        raise ValueError(f"--point: expected {POINT_FORM}, got {text!r}; write {words[0]} {words[1]}:{words[2]}")
    if colon and label.strip() not in ("0", "1"):
        raise ValueError(f"--point: expected {POINT_FORM}, got {text!r}")
    x, y = parse_numbers("--point", POINT_FORM, coordinates, 2)
    return x, y, int(label) if colon else 1


def parse_prompts(boxes: Sequence[str], points: Sequence[str], box_format: str = "xyxy") -> list[ObjectPrompt]:
    """Prompts, one an object: each box is an object, all points together are one; a box with points is one.

    Args:
        boxes, points: values of ``--box`` and ``--point`` as they were typed.
        box_format: one of `BOX_FORMATS`.

    Raises:
        ValueError: nothing was asked for, a value is malformed, or points come with several boxes.
    """
    if box_format not in BOX_FORMATS:
        raise ValueError(f"--box-format: expected {' or '.join(BOX_FORMATS)}, got {box_format!r}")
    if not boxes and not points:
        raise ValueError("prompt: expected at least one --box or --point, got none")
    if points and len(boxes) > 1:
        raise ValueError(
            f"prompt: expected at most one --box beside --point (they tell of one object), got {len(boxes)}"
        )
    parsed_boxes = [parse_box(text, box_format) for text in boxes]
    parsed_points = [parse_point(text) for text in points]
    if not parsed_points:
        return [ObjectPrompt(box=box) for box in parsed_boxes]
    return [
        ObjectPrompt(
            box=parsed_boxes[0] if parsed_boxes else None,
            points=tuple((x, y) for x, y, _ in parsed_points),
            labels=tuple(label for _, _, label in parsed_points),
        )
    ]


def fit_prompts(size: tuple[int, int], prompts: Sequence[ObjectPrompt]) -> tuple[list[ObjectPrompt], list[str]]:
    """The prompts for a photograph of ``size`` (width, height), boxes clipped to it; a line for each that was.

    Every point must lie in the photograph, and every box at least in part.

    Raises:
        ValueError: naming the option, the photograph's extent and what came.
    """
    fitted, notes = [], []
    for prompt in prompts:
        for point in prompt.points:
            _check_point(size, point)
        if prompt.box is None:
            fitted.append(prompt)
            continue
        box = _clipped(size, prompt.box)
        if box != prompt.box:
            width, height = size
            notes.append(f"--box {spelled(prompt.box)} is clipped to {spelled(box)}: the photo is {width} x {height}")
        fitted.append(replace(prompt, box=box))
    return fitted, notes


def _clipped(size: tuple[int, int], box: Box) -> Box:
    width, height = size
    x0, y0, x1, y1 = box
    if max(size) > SMALLEST_BOX:
        if all(0 <= one <= 1 for one in box) or (max(map(abs, box)) <= SMALLEST_BOX and _tiny(box)):
            pixels = spelled([round(one * side, 1) for one, side in zip(box, (*size, *size), strict=True)])
            raise ValueError(
                f"--box: expected pixels, got {spelled(box)}, which looks normalised; in pixels of this "
                f"{width} x {height} photo it would be X0 Y0 X1 Y1 = {pixels}"
            )
        if _tiny(box):
            raise ValueError(f"--box: expected a side of {SMALLEST_BOX:g} pixels or more, got {spelled(box)}")
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise ValueError(f"--box: expected a box that meets {_extent(size)}, got {spelled(box)}")
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def _tiny(box: Box) -> bool:
    return box[2] - box[0] < SMALLEST_BOX and box[3] - box[1] < SMALLEST_BOX


def _check_point(size: tuple[int, int], point: tuple[float, float]) -> None:
    (width, height), (x, y) = size, point
    if 0 < x < 1 and 0 < y < 1 and max(size) > SMALLEST_BOX:
        raise ValueError(
            f"--point: expected pixels, got {spelled(point)}, which looks normalised; in pixels of this "
            f"{width} x {height} photo it would be {spelled([round(x * width, 1), round(y * height, 1)])}"
        )
    if not (0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"--point: expected {_extent(size)}, got {spelled(point)}")


def _extent(size: tuple[int, int]) -> str:
    return f"0 <= X <= {size[0]}, 0 <= Y <= {size[1]} (the photo's size)"
