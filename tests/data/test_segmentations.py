"""COCO's segmentations against COCO's own tools, and what is refused before anything is decoded."""

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask as pycoco_mask

from stable_sam_cuda.data.segmentations import SegmentationError, borders_around, borders_of, decode_segmentation

# pycocotools on a numpy that is newer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 20, 30
SQUARE = [2, 3, 12, 3, 12, 9, 2, 9]  # columns 2 to 11, rows 3 to 8
TRIANGLE = [20.5, 1.0, 29.0, 4.0, 22.0, 18.5]

# Whole numbers and fifths, where rounding is decided, and anything else; inside, and up to a few pictures outside.
NUMBERS = st.one_of(
    st.integers(-60, 90),
    st.integers(-300, 450).map(lambda fifths: fifths / 5 + 0.1),
    st.floats(-500, 500, allow_nan=False, width=32),
)
POLYGONS = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=8), min_size=1, max_size=3)
SIDES = st.integers(1, 40)


def by_pycocotools(polygons, height, width):
    runs = pycoco_mask.frPyObjects([[float(one) for one in polygon] for polygon in polygons], height, width)
    return pycoco_mask.decode(pycoco_mask.merge(runs)).astype(bool)


def pairs(numbers):
    return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(polygons=POLYGONS, height=SIDES, width=SIDES)
def test_polygons_have_the_pixels_of_cocos_own_tools(polygons, height, width):
    flat = [[one for corner in polygon for one in corner] for polygon in polygons]
    assume(any(not -0.05 < one < 1.05 for polygon in flat for one in polygon))
    assert (decode_segmentation(flat, height, width) == by_pycocotools(flat, height, width)).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(height=SIDES, width=SIDES, data=st.data())
def test_run_lengths_of_every_form_are_the_mask_again(height, width, data):
    seed, density = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    mask = np.random.default_rng(seed).random((height, width)) < density
    packed = pycoco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    steps = np.flatnonzero(np.diff(mask.ravel("F"), prepend=False))
    counts = np.diff([0, *steps, mask.size]).tolist()
    for form in (packed["counts"], packed["counts"].decode(), counts, [float(one) for one in counts], [*counts, 0, 0]):
        found = decode_segmentation({"size": [height, width], "counts": form}, height, width)
        assert (found == mask).all()
    assert (borders_around(mask) == borders_of(packed, height, width)).all()


FRACTIONS = {
    "square": [[0.1, 0.2, 0.6, 0.2, 0.6, 0.7, 0.1, 0.7]],
    "whole_picture": [[0, 0, 1, 0, 1, 1, 0, 1]],
    "several": [[0.1, 0.2, 0.6, 0.2, 0.6, 0.7], [0.8, 0.9, 0.95, 0.9, 0.99, 0.99]],
    "pairs": [[0.1, 0.2], [0.6, 0.2], [0.6, 0.7]],
    "rounded_beyond_the_edge": [[-1e-6, 0.2, 1.0000001, 0.2, 0.6, 0.7]],
}


@pytest.mark.parametrize("segmentation", FRACTIONS.values(), ids=FRACTIONS)
def test_corners_that_are_fractions_of_the_picture_are_refused(segmentation):
    with pytest.raises(SegmentationError, match="expected corners in pixels, got ones within 0 to 1"):
        decode_segmentation(segmentation, HEIGHT, WIDTH)


def test_an_object_of_a_few_pixels_in_the_corner_is_no_fraction():
    assert decode_segmentation([[0, 0, 2, 0, 2, 1, 0, 1]], HEIGHT, WIDTH).sum() == 2
    assert decode_segmentation([[0, 0, 1, 0, 1, 1], [5, 5, 7, 5, 7, 7, 5, 7]], HEIGHT, WIDTH).sum() >= 4


def test_run_lengths_of_a_large_picture():
    mask = np.zeros((3000, 2000), np.uint8)
    mask[100:2900, 30:1900] = 1
    packed = pycoco_mask.encode(np.asfortranarray(mask))
    assert (decode_segmentation(packed, 3000, 2000) == mask).all()


@pytest.mark.parametrize(
    "form",
    [
        SQUARE + SQUARE[:2],
        [SQUARE],
        [SQUARE + SQUARE[:2]],
        pairs(SQUARE),
        [pairs(SQUARE)],
        [tuple(SQUARE)],
        SQUARE,
        [float(one) for one in SQUARE],
    ],
    ids=["flat_closed", "nested", "closed", "pairs", "nested_pairs", "tuples", "flat", "floats"],
)
def test_every_form_of_one_polygon_is_the_same_object(form):
    assert (decode_segmentation(form, HEIGHT, WIDTH) == by_pycocotools([SQUARE], HEIGHT, WIDTH)).all()


def with_peak(call):
    """What the call returns, and the most bytes that it held; the process's own peak may lie far above."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_forms_can_be_mixed_and_parts_are_joined():
    found = decode_segmentation([SQUARE, pairs(TRIANGLE), SQUARE], HEIGHT, WIDTH)
    assert (found == by_pycocotools([SQUARE, TRIANGLE], HEIGHT, WIDTH)).all()


@pytest.mark.parametrize("far", [1e5, 1e7, 1e8, 1e9, 1e12, 1e300, 1.7e308, 10**300], ids=str)
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("sign", [1, -1], ids=["right", "left"])
def test_a_far_corner_costs_nothing_and_is_drawn_in_its_direction(far, place, sign):
    polygon = [10.0, 10.0, 26.0, 11.0, 15.0, 18.0]
    near = polygon.copy()
    polygon[place], near[place] = sign * far, sign * 2e4
    start = time.process_time()
    found, peak = with_peak(lambda: decode_segmentation([polygon], HEIGHT, WIDTH))
    assert time.process_time() - start < 0.5
    assert peak < 50e6
    # A corner at 20,000 px is as good as one at infinity, but for a pixel at the edges.
    assert (found != by_pycocotools([near], HEIGHT, WIDTH)).sum() <= 3
    assert found.any() or not by_pycocotools([near], HEIGHT, WIDTH).any()


@pytest.mark.parametrize("far", [1.1e7, 1e9, 1e300], ids=str)
def test_a_polygon_around_everything_fills_the_picture(far):
    around = [-far, -far, far, -far, far, far, -far, far]
    assert decode_segmentation([around], HEIGHT, WIDTH).all()
    assert not decode_segmentation([[far, far, 2 * far, far, far, 2 * far]], HEIGHT, WIDTH).any()


def test_many_long_edges_take_little_memory():
    rng = np.random.default_rng(0)
    zigzag = rng.uniform(-1e6, 1e6, 4000).tolist()
    _, peak = with_peak(lambda: decode_segmentation(zigzag, 800, 1000))
    assert 1e6 < peak < 300e6


SIZE = {"size": [HEIGHT, WIDTH]}
DEEP = [[[[[1, 2]]]]]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "expected a segmentation, got none"),
        ([], "expected a segmentation, got none"),
        ({}, "expected a segmentation, got none"),
        ("text", "expected polygons or run lengths"),
        (7, "expected polygons or run lengths"),
        (True, "expected polygons or run lengths"),
        ([[]], "three or more x, y pairs"),
        ([[1, 1, 2, 2]], "three or more x, y pairs"),
        ([[1, 1], [2, 2]], "three or more x, y pairs"),
        ([SQUARE, [1, 1, 2, 2]], "three or more x, y pairs"),
        ([[*SQUARE, 5]], "three or more x, y pairs"),
        ([[*SQUARE[:-1], None]], "expected numbers for a polygon"),
        ([[*SQUARE[:-1], "9"]], "expected numbers for a polygon"),
        ([[*SQUARE[:-1], True]], "expected numbers for a polygon"),
        ([[*SQUARE[:-1], [9]]], "expected numbers for a polygon"),
        ([{"x": 1}, {"x": 2}], "expected numbers for a polygon"),
        ([SQUARE, 5], "expected a polygon"),
        ([SQUARE, {"size": [1, 1], "counts": [1]}], "expected a polygon"),
        (DEEP, "expected numbers for a polygon"),
        ([[*SQUARE[:-1], math.nan]], "expected finite numbers"),
        ([[*SQUARE[:-1], math.inf]], "expected finite numbers"),
        ([[*SQUARE[:-1], -math.inf]], "expected finite numbers"),
        ([[*SQUARE[:-1], 10**400]], "expected finite numbers"),
        ({"counts": [0, 600]}, "run lengths of size [20, 30], got another"),
        ({"size": [5, 5], "counts": [0, 25]}, "run lengths of size [20, 30], got another"),
        ({"size": 600, "counts": [0, 600]}, "run lengths of size [20, 30], got another"),
        ({"size": ["20", "30"], "counts": [0, 600]}, "run lengths of size [20, 30], got another"),
        ({"size": [30, 20], "counts": [0, 600]}, "with width and height swapped"),
        (SIZE, "run lengths as a list or text"),
        ({**SIZE, "counts": 600}, "run lengths as a list or text"),
        ({**SIZE, "counts": {"0": 600}}, "run lengths as a list or text"),
        ({**SIZE, "counts": []}, "sum to height x width"),
        ({**SIZE, "counts": [0, 599]}, "sum to height x width"),
        ({**SIZE, "counts": [300, 301]}, "sum to height x width"),
        ({**SIZE, "counts": [700, -100]}, "of 0 to height x width"),
        ({**SIZE, "counts": [10**30]}, "of 0 to height x width"),
        ({**SIZE, "counts": [0.5, 599.5]}, "whole run lengths"),
        ({**SIZE, "counts": [math.nan, 600]}, "whole run lengths"),
        ({**SIZE, "counts": [math.inf, 600]}, "whole run lengths"),
        ({**SIZE, "counts": ["0", "600"]}, "whole run lengths"),
        ({**SIZE, "counts": [True, 599]}, "whole run lengths"),
        ({**SIZE, "counts": [[600]]}, "whole run lengths"),
        ({**SIZE, "counts": ""}, "sum to height x width"),
        ({**SIZE, "counts": "0d0"}, "sum to height x width"),
        ({**SIZE, "counts": "0d0Tb"}, "a number that does not end"),
        ({**SIZE, "counts": "o" * 100 + "0"}, "a number that does not end"),
        ({**SIZE, "counts": "0 d0"}, "characters 0 to o"),
        ({**SIZE, "counts": "0\ud800"}, "characters 0 to o"),
        ({**SIZE, "counts": "é"}, "characters 0 to o"),
        ({**SIZE, "counts": b"\xff\x00"}, "characters 0 to o"),
        ({**SIZE, "counts": "ooooo0"}, "of 0 to height x width"),
        ({**SIZE, "counts": "O"}, "of 0 to height x width"),
    ],
    ids=lambda value: None if isinstance(value, str) else ascii(value)[:40],
)
def test_what_is_no_segmentation_is_refused_in_words(segmentation, message):
    with pytest.raises(SegmentationError) as caught:
        decode_segmentation(segmentation, HEIGHT, WIDTH)
    assert message in str(caught.value)
    assert "got" in caught.value.reason
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(segmentation=GARBAGE)
def test_garbage_is_a_mask_or_refused_and_nothing_else(segmentation):
    try:
        assert decode_segmentation(segmentation, HEIGHT, WIDTH).shape == (HEIGHT, WIDTH)
    except SegmentationError as error:
        assert len(str(error)) < 250


@settings(max_examples=300, derandomize=True, deadline=None)
@given(packed=st.text(st.characters(min_codepoint=47, max_codepoint=112), max_size=12))
def test_any_packed_text_is_a_mask_or_refused(packed):
    try:
        decode_segmentation({"size": [HEIGHT, WIDTH], "counts": packed}, HEIGHT, WIDTH)
    except SegmentationError:
        return
    reference = {"size": [HEIGHT, WIDTH], "counts": packed}
    assert (decode_segmentation(reference, HEIGHT, WIDTH) == pycoco_mask.decode(reference)).all()
