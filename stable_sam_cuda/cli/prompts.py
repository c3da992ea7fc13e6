"""Boxes and points from the command line, checked against the photograph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BOX_FORM = "four numbers X0 Y0 X1 Y1"
POINT_FORM = "two numbers X Y, or X Y:0 for background"


@dataclass(frozen=True)
class ObjectPrompt:
    """What is known of one object: a box, points, or both; pixels of the photograph.

    ``box`` is (x0, y0, x1, y1); ``points`` are (x, y) with ``labels`` 1 for the object, 0 for background.
    """

    box: tuple[float, float, float, float] | None = None
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


def parse_numbers(option: str, form: str, tokens: Sequence[str]) -> list[float]:
    """Finite numbers from words.

    Raises:
        ValueError: naming the option, its form and the words that came.
    """
    got = " ".join(tokens)
    try:
        numbers = [float(token) for token in tokens]
    except ValueError:
        raise ValueError(f"{option}: expected {form}, got {got!r}") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{option}: expected finite numbers, got {got!r}")
    return numbers


def parse_box(text: str) -> tuple[float, float, float, float]:
    """``"x0 y0 x1 y1"`` as a box with x0 < x1 and y0 < y1."""
    tokens = text.split()
    if len(tokens) != 4:
        raise ValueError(f"--box: expected {BOX_FORM}, got {text!r}")
    x0, y0, x1, y1 = parse_numbers("--box", BOX_FORM, tokens)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"--box: expected X0 < X1 and Y0 < Y1, got {text!r}")
    return x0, y0, x1, y1


def parse_point(text: str) -> tuple[float, float, int]:
    """``"x y"``, ``"x y:1"`` or ``"x y:0"`` as (x, y, label)."""
    coordinates, colon, label = text.partition(":")
    tokens = coordinates.split()
    if len(tokens) != 2 or (colon and label.strip() not in ("0", "1")):
        raise ValueError(f"--point: expected {POINT_FORM}, got {text!r}")
    x, y = parse_numbers("--point", POINT_FORM, tokens)
    return x, y, int(label) if colon else 1


def check_inside(size: tuple[int, int], boxes: Sequence[Sequence[float]], points: Sequence[Sequence[float]]) -> None:
    """Every point lies in the photograph of ``size`` (width, height), and every box at least in part.

    A sloppy box may reach beyond the photograph: the predictor clips it.

    Raises:
        ValueError: naming the option, the photograph's extent and what came.
    """
    width, height = size
    extent = f"0 <= X <= {width}, 0 <= Y <= {height} (the photo's size)"
    for x0, y0, x1, y1 in boxes:
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise ValueError(f"--box: expected a box that meets {extent}, got {x0:g} {y0:g} {x1:g} {y1:g}")
    for x, y, *_ in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"--point: expected {extent}, got {x:g} {y:g}")


def make_prompts(size: tuple[int, int], boxes: Sequence[str], points: Sequence[str]) -> list[ObjectPrompt]:
    """Prompts, one an object: each box is an object, all points together are one; a box with points is one.

    Args:
        size: (width, height) of the photograph.
        boxes, points: values of ``--box`` and ``--point`` as they were typed.

    Raises:
        ValueError: nothing was asked for, a value is malformed or outside, or points come with several boxes.
    """
    if not boxes and not points:
        raise ValueError("prompt: expected at least one --box or --point, got none")
    if points and len(boxes) > 1:
        raise ValueError(
            f"prompt: expected at most one --box beside --point (they tell of one object), got {len(boxes)}"
        )
    parsed_boxes = [parse_box(text) for text in boxes]
    parsed_points = [parse_point(text) for text in points]
    check_inside(size, parsed_boxes, parsed_points)
    if not parsed_points:
        return [ObjectPrompt(box=box) for box in parsed_boxes]
    return [
        ObjectPrompt(
            box=parsed_boxes[0] if parsed_boxes else None,
            points=tuple((x, y) for x, y, _ in parsed_points),
            labels=tuple(label for _, _, label in parsed_points),
        )
    ]
