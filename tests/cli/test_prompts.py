"""What is typed becomes prompts, or one clear line says why not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_sam_cuda.cli.options import join_words
from stable_sam_cuda.cli.prompts import ObjectPrompt, fit_prompts, parse_prompts

SIZE = (100, 80)
WORD_COUNTS = {"--box": 4, "--point": 2}


def make_prompts(size, boxes, points, box_format="xyxy"):
    return fit_prompts(size, parse_prompts(boxes, points, box_format))[0]


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


@pytest.mark.parametrize("text", ["1 2 30 40", "1,2,30,40", "1, 2, 30, 40", " 1  2,30 ,40 "])
def test_numbers_stand_between_spaces_or_commas(text: str) -> None:
    assert make_prompts(SIZE, [text], []) == [ObjectPrompt(box=(1, 2, 30, 40))]


def test_a_box_by_width_and_height() -> None:
    assert make_prompts(SIZE, ["10 20 30 40"], [], "xywh") == [ObjectPrompt(box=(10, 20, 40, 60))]


@pytest.mark.parametrize(
    ("box", "clipped"),
    [("-5 -5 105 85", "0 0 100 80"), ("10 20 30 90", "10 20 30 80"), ("10 20 100.5 30", "10 20 100 30")],
)
def test_a_box_that_reaches_beyond_the_photo_is_clipped_and_that_is_said(box: str, clipped: str) -> None:
    (prompt,), notes = fit_prompts(SIZE, parse_prompts([box], []))
    assert prompt.box == tuple(map(float, clipped.split()))
    assert notes == [f"--box {box} is clipped to {clipped}: the photo is 100 x 80"]


def test_a_box_within_the_photo_needs_no_words() -> None:
    assert fit_prompts(SIZE, parse_prompts(["0 0 100 80"], ["0 80"]))[1] == []


@pytest.mark.parametrize(
    ("boxes", "points", "pixels"),
    [
        (["0.24 0.26 0.64 0.83"], [], "24 20.8 64 66.4"),
        (["0 0 1 1"], [], "0 0 100 80"),
        (["0.5,0.5,1.02,1.1"], [], "50 40 102 88"),
        ([], ["0.5 0.25"], "50 20"),
    ],
    ids=["box", "whole", "beyond", "point"],
)
def test_normalised_coordinates_are_refused_with_what_they_would_be(boxes: list, points: list, pixels: str) -> None:
    with pytest.raises(ValueError, match=f"looks normalised; in pixels of this 100 x 80 photo .* {pixels}$"):
        make_prompts(SIZE, boxes, points)


def test_a_photo_of_a_pixel_may_be_boxed() -> None:
    assert make_prompts((1, 1), ["0 0 1 1"], ["0.5 0.5"]) == [ObjectPrompt((0, 0, 1, 1), ((0.5, 0.5),), (1,))]


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
        (["1 2 3 4 5"], [], "--box: expected four numbers X0 Y0 X1 Y1, got '1 2 3 4 5'"),
        (["1,,3,4"], [], "--box: expected four numbers X0 Y0 X1 Y1, got '1,,3,4'"),
        (["1 2 1e400 4"], [], "--box: expected finite numbers, got '1 2 1e400 4'"),
        (["50 50 51 51.5"], [], "--box: expected a side of 2 pixels or more, got 50 50 51 51.5"),
        ([], ["33 19 0"], "got '33 19 0'; write 33 19:0"),
        ([], ["33,19,1"], "got '33,19,1'; write 33 19:1"),
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
        ("--box 1,2,3,4 a.png", ["--box=1,2,3,4", "a.png"]),
        ("--box 1, 2, 3, 4 a.png", ["--box=1, 2, 3, 4", "a.png"]),
        ("--point 1,2:0 a.png", ["--point=1,2:0", "a.png"]),
        ("--point 1 2 0 a.png", ["--point=1 2 0", "a.png"]),
        ("--point 1 2 :0 a.png", ["--point=1 2 :0", "a.png"]),
        ("--point 1 2 0.png", ["--point=1 2", "0.png"]),
        ("--out x -- --box 1", ["--out", "x", "--", "--box", "1"]),
    ],
)
def test_words_are_joined(words: str, joined: list[str]) -> None:
    assert join_words(words.split(), WORD_COUNTS) == joined


NUMBERS = st.one_of(
    st.floats(width=32).map(str),
    st.integers(-300, 300).map(str),
    st.sampled_from(["", "1e400", "x", "0x1", "\u0661", "1_0"]),
)
VALUES = st.tuples(st.sampled_from([" ", ",", ", ", ":"]), st.lists(NUMBERS, max_size=6)).map(
    lambda one: one[0].join(one[1])
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(VALUES, max_size=2), st.lists(VALUES, max_size=2), st.sampled_from(["xyxy", "xywh"]))
def test_whatever_is_typed_is_a_prompt_within_the_photo_or_one_line(
    boxes: list[str], points: list[str], box_format: str
) -> None:
    try:
        prompts = make_prompts(SIZE, boxes, points, box_format)
    except ValueError as error:
        assert str(error).startswith(("--box: expected ", "--point: expected ", "prompt: expected "))
        assert "\n" not in str(error)
        return
    for prompt in prompts:
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            assert 0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 80
        assert all(0 <= x <= 100 and 0 <= y <= 80 for x, y in prompt.points)
        assert set(prompt.labels) <= {0, 1}
