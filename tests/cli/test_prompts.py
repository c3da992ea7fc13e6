"""What is typed becomes prompts, or one clear line says why not."""

import pytest

from stable_sam_cuda.cli.options import join_words
from stable_sam_cuda.cli.prompts import ObjectPrompt, make_prompts

SIZE = (100, 80)
WORD_COUNTS = {"--box": 4, "--point": 2}


def test_each_box_is_an_object() -> None:
    assert make_prompts(SIZE, ["0 0 100 80", "1.5 2 3 4"], []) == [
        ObjectPrompt(box=(0, 0, 100, 80)),
        ObjectPrompt(box=(1.5, 2, 3, 4)),
    ]


def test_all_points_are_one_object() -> None:
    assert make_prompts(SIZE, [], ["10 20", "30 40:0", "5 6:1"]) == [
        ObjectPrompt(points=((10, 20), (30, 40), (5, 6)), labels=(1, 0, 1))
    ]


def test_a_box_with_points_is_one_object() -> None:
    assert make_prompts(SIZE, ["0 0 9 9"], ["10 20:0"]) == [
        ObjectPrompt(box=(0, 0, 9, 9), points=((10, 20),), labels=(0,))
    ]


def test_a_box_may_reach_beyond_the_photo() -> None:
    assert make_prompts(SIZE, ["-5 -5 105 85"], []) == [ObjectPrompt(box=(-5, -5, 105, 85))]


@pytest.mark.parametrize(
    ("boxes", "points", "message"),
    [
        ([], [], "prompt: expected at least one --box or --point, got none"),
        (["0 0 1 1", "0 0 2 2"], ["3 3"], "prompt: expected at most one --box beside --point"),
        (["1 2 3"], [], "--box: expected four numbers X0 Y0 X1 Y1, got '1 2 3'"),
        (["1 2 3 x"], [], "--box: expected four numbers X0 Y0 X1 Y1, got '1 2 3 x'"),
        (["1 2 nan 4"], [], "--box: expected finite numbers, got '1 2 nan 4'"),
        (["1 2 inf 4"], [], "--box: expected finite numbers, got '1 2 inf 4'"),
        (["9 2 3 4"], [], "--box: expected X0 < X1 and Y0 < Y1, got '9 2 3 4'"),
        (["1 2 1 4"], [], "--box: expected X0 < X1 and Y0 < Y1, got '1 2 1 4'"),
        (
            ["-9 2 0 4"],
            [],
            "--box: expected a box that meets 0 <= X <= 100, 0 <= Y <= 80 (the photo's size), got -9 2 0 4",
        ),
        (["100 2 120 4"], [], "--box: expected a box that meets 0 <= X <= 100"),
        (["1 80 3 99"], [], "0 <= Y <= 80"),
        ([], ["1"], "--point: expected two numbers X Y, or X Y:0 for background, got '1'"),
        ([], ["1 2:2"], "--point: expected two numbers X Y, or X Y:0"),
        ([], ["1:0 2"], "--point: expected two numbers X Y, or X Y:0"),
        ([], ["1 b"], "--point: expected two numbers X Y"),
        ([], ["1 nan"], "--point: expected finite numbers, got '1 nan'"),
        ([], ["101 2"], "--point: expected 0 <= X <= 100"),
        ([], ["1 -2:0"], "--point: expected 0 <= X <= 100, 0 <= Y <= 80"),
    ],
)
def test_bad_prompts(boxes: list[str], points: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_prompts(SIZE, boxes, points)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ("a.png --box 1 2 3 4", ["a.png", "--box=1 2 3 4"]),
        ("--box -1 2 3 4 a.png", ["--box=-1 2 3 4", "a.png"]),
        ("--point 1 2:0 --point 3 4 --multimask", ["--point=1 2:0", "--point=3 4", "--multimask"]),
        ("--box 1 2 --out x", ["--box=1 2", "--out", "x"]),
        ("--box", ["--box="]),
        ("--out x -- --box 1", ["--out", "x", "--", "--box", "1"]),
    ],
)
def test_words_are_joined(words: str, joined: list[str]) -> None:
    assert join_words(words.split(), WORD_COUNTS) == joined
