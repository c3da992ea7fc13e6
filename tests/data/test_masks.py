"""What mask files mean: alone and in sets, by examples and by generated masks."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_drawings import ONE, TWO, bordered, disc, grid, soft, told_by, with_alpha, written, written_set
from PIL import Image

from stable_sam_cuda.data.mask_evidence import evidence_of, verdict_of_set
from stable_sam_cuda.data.masks import MaskSet, read_ids
from stable_sam_cuda.data.samples import MaskedImage

FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("count", [2, 20, 127, 128, 129, 200, 253, 254, 255, 256, 300, 1000])
@pytest.mark.parametrize("size", [(10, 14), (4, 4), (3, 3), (2, 2), (1, 1)], ids=["10x14", "4x4", "3x3", "2x2", "1x1"])
def test_as_many_objects_as_were_drawn(tmp_path, count, size):
    mask = grid(count, *size)
    ids, told = told_by(lambda: read_ids(written(tmp_path / "mask.png", mask)))
    assert (ids == mask).all()
    assert not told


@pytest.mark.parametrize(
    "values",
    [(3, 300), (1, 255), (7, 90), (1, 2), (128, 255), (254, 255, 1), (254, 255), (231, 236), (24001, 24002)],
    ids=str,
)
def test_two_large_objects_of_any_ids_are_two(tmp_path, values):
    mask = np.zeros((60, 60), np.uint16 if max(values) > 255 else np.uint8)
    for index, value in enumerate(values):
        mask[index * 20 : index * 20 + 18 - 5 * index, 5:50] = value
    ids = read_ids(written(tmp_path / "mask.png", mask), "instances" if values == (1, 255) else "auto")
    assert (ids == mask).all()


SOFT = {
    "white-255": soft(255),
    "white-254": soft(254),
    "white-200": soft(200),
    "white-100": soft(100),
    "hardly-soft": soft(254, blur=0.5),
    "wide-feather": soft(255, blur=12),
    "16-bit": soft(255, dtype=np.uint16, scale=257),
    "12-bit": soft(4095, dtype=np.uint16),
    "small": soft(250, radius=4, size=60, centre=(30, 30), blur=1),
    "resized": cv2.resize((disc() * 254).astype(np.uint8), (333, 333), interpolation=cv2.INTER_CUBIC),
    "halved": cv2.resize((disc() * 254).astype(np.uint8), (50, 50), interpolation=cv2.INTER_AREA),
}


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in-a-set"])
@pytest.mark.parametrize("mask", SOFT.values(), ids=SOFT)
def test_soft_edges_are_no_objects(tmp_path, mask, alone):
    path = written(tmp_path / "mask.png", mask)
    others = [] if alone else written_set(tmp_path, [soft(251), (disc() * 255).astype(np.uint8), soft(255, blur=1)])
    ids = MaskSet([path, *others]).read(path)
    assert set(np.unique(ids)) == {0, 1}
    assert (ids == (mask > mask.max() / 2)).all()


blobs = st.lists(
    st.tuples(st.integers(5, 115), st.integers(5, 145), st.integers(1, 22), st.integers(1, 22)), min_size=2, max_size=60
)


larger = st.lists(
    st.tuples(st.integers(20, 100), st.integers(20, 130), st.integers(5, 30), st.integers(5, 30)),
    min_size=1,
    max_size=9,
)


def drawn(ellipses, first=1) -> np.ndarray:
    ids = np.zeros((120, 150), np.float32)
    for index, (y, x, tall, wide) in enumerate(ellipses):
        cv2.ellipse(ids, (x, y), (wide, tall), 0, 0, 360, index + first, -1)
    return ids


@FEW
@given(blobs, st.sampled_from([1, 3, 4]))
def test_generated_ids_are_kept(tmp_path, ellipses, step):
    mask = (drawn(ellipses) * step).astype(np.uint8)
    if len(np.unique(mask)) > 2:
        assert (read_ids(written(tmp_path / "mask.png", mask)) == mask).all()


@FEW
@given(
    larger,
    st.integers(100, 255),
    st.sampled_from(["blur", "feather", "enlarge", "shrink", "jpeg"]),
    st.floats(0.1, 1.0),
)
def test_generated_soft_masks_are_one_object(tmp_path, ellipses, white, how, amount):
    mask = (drawn(ellipses) > 0).astype(np.float32)
    if how == "blur":
        mask = cv2.GaussianBlur(mask, (0, 0), 0.4 + 4 * amount)
    elif how == "feather":
        mask = (cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5) / (2 + 6 * amount)).clip(0, 1)
    elif how == "enlarge":
        mask = cv2.resize(mask, None, fx=1 + 3 * amount, fy=1 + 3 * amount, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    elif how == "shrink":
        mask = cv2.resize(mask, None, fx=0.3 + amount / 2, fy=0.3 + amount / 2, interpolation=cv2.INTER_AREA)
    shades = np.rint(mask * white).astype(np.uint8)
    if how == "jpeg":
        shades = cv2.imdecode(cv2.imencode(".jpg", shades, [cv2.IMWRITE_JPEG_QUALITY, 40 + int(58 * amount)])[1], 0)
    if shades.max() < white / 2 or len(np.unique(shades)) < 3:
        return  # nothing is left of the drawing, or it has no edges in shades
    verdict = verdict_of_set([evidence_of(shades)])
    assert verdict is not None
    assert verdict.meaning == "binary"


@settings(FEW, max_examples=12)
@given(st.lists(st.tuples(larger, st.integers(90, 255), st.floats(0.5, 6)), min_size=2, max_size=5), st.booleans())
def test_generated_sets_are_read_alike(tmp_path, files, are_ids):
    masks = []
    for ellipses, white, blur in files:
        ids = drawn(ellipses)
        whole = cv2.GaussianBlur((ids > 0).astype(np.float32), (0, 0), blur)
        masks.append((ids if are_ids else np.rint(whole * white)).astype(np.uint8))
    if are_ids and all(len(np.unique(mask)) < 3 for mask in masks):
        return
    paths = written_set(tmp_path, masks)
    masks_set = MaskSet(paths)
    assert masks_set.meaning == ("instances" if are_ids else "binary")
    for path, mask in zip(paths, masks, strict=True):
        assert (masks_set.read(path) == (mask if are_ids else mask > mask.max() / 2)).all()


def test_the_set_decides_and_what_contradicts_is_said(tmp_path):
    paths = written_set(tmp_path, [grid(count) for count in (3, 200, 255, 40)] + [soft(255)])
    masks = MaskSet(paths)
    ids, told = told_by(lambda: [masks.read(path) for path in paths])
    assert masks.meaning == "instances"
    assert (ids[2] == grid(255)).all()
    assert [Path(one.subject).name for one in told] == ["004.png"]
    assert "seems to hold one object with soft edges" in told[0].reason
    paths = written_set(tmp_path, [soft(white) for white in (255, 250, 240, 200)] + [grid(200)])
    ids, told = told_by(lambda: MaskSet(paths).read(paths[-1]))
    assert ids.max() == 1
    assert "seems to hold ids" in told[0].reason


def test_what_is_in_doubt_is_said_once_and_can_be_settled(tmp_path):
    paths = written_set(tmp_path, [soft(255), grid(200)])
    masks = MaskSet(paths)
    with ThreadPoolExecutor(4) as workers:
        _, told = told_by(lambda: list(workers.map(masks.read, paths * 4)))
    doubts = [one for one in told if "in doubt" in one.reason]
    assert len(doubts) == 1
    assert "--masks binary, instances or void" in doubts[0].reason
    for meaning, objects in (("binary", 1), ("instances", 200), ("void", 200)):
        ids, told = told_by(lambda meaning=meaning: MaskSet(paths, meaning).read(paths[1]))
        assert len(np.unique(ids)) == objects + 1
        assert not told


@pytest.mark.parametrize(
    ("mask", "is_void"),
    [
        (bordered(grid(2), 255), True),
        (bordered(grid(20), 255), True),
        (bordered(grid(150), 255), True),
        (bordered(grid(300), 65535), True),
        (grid(255), False),
        (grid(5) * 51, False),
        (bordered(grid(2) * 7, 255), False),
        (np.where(grid(255) == 7, 0, grid(255)), False),
    ],
    ids=["1-2-255", "1-to-20-255", "1-to-150-255", "16-bit", "1-to-255", "51-to-255", "7-14-255", "one-missing"],
)
def test_a_void_border_is_no_object(tmp_path, mask, is_void):
    path = written(tmp_path / "mask.png", mask)
    ids, told = told_by(lambda: read_ids(path))
    void = 65535 if mask.dtype == np.uint16 else 255
    assert (ids == (np.where(mask == void, 0, mask) if is_void else mask)).all()
    assert any("border without object" in one.reason for one in told) == is_void
    assert (read_ids(path, "instances") == mask).all()
    assert (read_ids(path, "void") == np.where(mask == void, 0, mask)).all()


def test_void_is_seen_in_the_set(tmp_path):
    """255 is an id where other files of the set have it alone, and void where it lies beside ids in most."""
    voc = [bordered(grid(count), 255) for count in (1, 2, 5, 9)]
    assert MaskSet(written_set(tmp_path, voc)).meaning == "void"
    alone = np.where(grid(1) == 1, 255, 0).astype(np.uint8)
    assert MaskSet(written_set(tmp_path, [*voc, alone])).meaning == "instances"


def test_a_set_goes_to_another_process_and_an_unknown_meaning_is_refused(tmp_path):
    paths = written_set(tmp_path, [grid(3), grid(9)])
    masks = MaskSet(paths)
    assert pickle.loads(pickle.dumps(masks)).meaning == masks.meaning == "instances"
    with pytest.raises(ValueError, match="masks: expected one of auto, binary, instances, void, got 'ids'"):
        MaskSet(paths, "ids")


def test_a_mask_that_was_not_turned_with_its_picture_is_turned_along(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(shown)))
    image = written(tmp_path / "image.png", lying, exif=exif)
    mask = written(tmp_path / "mask.png", np.ascontiguousarray(np.rot90(TWO)))
    (picture, ids), told = told_by(MaskedImage("set/a", image, mask).load)
    assert (picture == shown).all()
    assert (ids == TWO).all()
    assert ["turned along" in one.reason for one in told] == [True]
    with pytest.raises(ValueError, match=r"set/a: picture has size \(60, 80\), its mask \(60, 79\)"):
        MaskedImage("set/a", image, written(mask, TWO[:, :79])).load()


def test_digests_follow_bytes_and_meaning(tmp_path):
    image = written(tmp_path / "image.png", np.zeros((60, 80, 3), np.uint8))
    mask = written(tmp_path / "mask.png", TWO)
    one = MaskedImage("set/a", image, mask)
    picture_digest, digest = one.picture_digest(), one.digest()
    assert len(picture_digest) == len(digest) == 64
    assert MaskedImage("other/name", image, mask).digest() == digest
    assert MaskedImage("set/a", image, mask, MaskSet([mask], "binary")).digest() != digest
    written(mask, TWO.T.copy().T[::-1])
    assert one.digest() != digest
    assert one.picture_digest() == picture_digest
    written(image, np.ones((60, 80, 3), np.uint8))
    assert one.picture_digest() != picture_digest


IDS_IN_GT = {
    "many": [grid(20), grid(7)],
    "two-each": [grid(2), grid(2)],
    "16-bit": [grid(300), grid(400)],
    "voc": [np.where(grid(3) == 3, 255, grid(3)), grid(2)],
}


@pytest.mark.parametrize("masks", IDS_IN_GT.values(), ids=IDS_IN_GT)
def test_ids_that_are_given_as_binary_are_said_once(tmp_path, masks):
    paths = written_set(tmp_path, masks)
    mask_set = MaskSet(paths, "binary")
    ids, told = told_by(lambda: [mask_set.read(path) for path in paths])
    assert all(one.max() == 1 for one in ids)
    assert ["say --masks instances" in one.reason for one in told] == [True]


@pytest.mark.parametrize("masks", [[mask] for mask in SOFT.values()] + [[disc().astype(np.uint8)]], ids=[*SOFT, "0-1"])
def test_binary_masks_that_are_given_as_binary_are_read_without_a_word(tmp_path, masks):
    path = written_set(tmp_path, masks)[0]
    assert not told_by(lambda: MaskSet([path], "binary").read(path))[1]


WIDE = {
    "16-bit-255": (np.uint16, 3, 255),
    "16-bit-65535": (np.uint16, 300, 65535),
    "32-bit-255": (np.int32, 3, 255),
    "32-bit-65535": (np.int32, 300, 65535),
    "32-bit-largest": (np.int32, 3, (1 << 31) - 1),
    "unsigned-32-bit-largest": (np.uint32, 3, (1 << 32) - 1),
    "float-255": (np.float32, 3, 255),
}


@pytest.mark.parametrize(("dtype", "count", "void"), WIDE.values(), ids=WIDE)
def test_the_void_border_of_more_than_8_bits(tmp_path, dtype, count, void):
    ids = grid(count).astype(np.int64)
    path = written(tmp_path / "mask.tif", bordered(ids, void).astype(dtype), photometric="minisblack")
    for masks in ("void", "auto"):
        read, told = told_by(lambda masks=masks: read_ids(path, masks))
        assert (read == ids).all()
        assert any(f"the value {void}" in one.reason for one in told) == (masks == "auto")


@pytest.mark.parametrize("mask", [grid(3), grid(300), grid(3).astype(np.float32)], ids=["8-bit", "16-bit", "float"])
def test_void_without_a_border_is_said(tmp_path, mask):
    path = written(tmp_path / "mask.tif", mask, photometric="minisblack")
    ids, told = told_by(lambda: read_ids(path, "void"))
    assert (ids == mask).all()
    assert ["no border to leave out" in one.reason for one in told] == [True]


UNCLAIMED = {
    "class-ids": [np.where(grid(2) == 2, 255, grid(2) * 15)],
    "few-of-many": [np.where(grid(4) == 4, 255, np.array([0, 1, 2, 9, 0], np.uint8)[grid(4)])],
    "one-file-of-five": [grid(3), grid(2), grid(4), grid(5), bordered(grid(2), 255)],
    "4-bit": [np.where(grid(3) == 3, 255, grid(3) * 17)],
    "16-bit": [np.where(grid(2) == 2, 65535, grid(2).astype(np.uint16) * 700)],
}


@pytest.mark.parametrize("masks", UNCLAIMED.values(), ids=UNCLAIMED)
def test_a_largest_value_that_is_taken_for_an_id_is_said_once(tmp_path, masks):
    paths = written_set(tmp_path, masks)
    mask_set = MaskSet(paths)
    ids, told = told_by(lambda: [mask_set.read(path) for path in paths])
    assert all((one == mask).all() for one, mask in zip(ids, masks, strict=True))
    assert ["say --masks void" in one.reason for one in told] == [True]


@pytest.mark.parametrize("mask", [grid(255), grid(5) * 51, grid(15) * 17, soft(255)], ids=["255", "51", "17", "soft"])
def test_ids_up_to_the_largest_value_are_read_without_a_word(tmp_path, mask):
    path = written(tmp_path / "mask.png", mask)
    assert not told_by(lambda: read_ids(path))[1]


@pytest.mark.parametrize("how", ["lines", "blurred-strokes", "faint-strokes"])
@pytest.mark.parametrize("count", [1, 8])
def test_thin_soft_strokes_are_one_object(tmp_path, how, count):
    random = np.random.default_rng(0)
    masks = []
    for _ in range(4):
        mask = np.zeros((240, 320), np.uint8)
        for start in random.integers(30, 200, (count, 2)):
            end = start + random.integers(-25, 100, 2)
            cv2.line(mask, start.tolist(), end.tolist(), 255, 1, cv2.LINE_AA)
        blurred = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.2)
        masks.append(mask if how == "lines" else blurred * (255 / blurred.max() if how == "blurred-strokes" else 1))
    paths = written_set(tmp_path, [np.rint(mask).astype(np.uint8) for mask in masks])
    assert MaskSet(paths).meaning == "binary"


@pytest.mark.parametrize("values", [(254, 255), (100, 101), (1, 2), (253, 254, 255)], ids=str)
def test_regions_that_fill_the_picture_are_kept_or_doubted(tmp_path, values):
    mask = np.repeat(np.array(values, np.uint8), 30)[None].repeat(60, 0)
    ids, told = told_by(lambda: read_ids(written(tmp_path / "mask.png", mask)))
    assert (ids == mask).all() or told


def test_a_mask_in_opacity_among_ids_is_called_so(tmp_path):
    paths = [*written_set(tmp_path, [grid(3), grid(9)]), written(tmp_path / "z.png", with_alpha(255, ONE * 255))]
    ids, told = told_by(lambda: MaskSet(paths).read(paths[-1]))
    assert (ids == ONE).all()
    assert ["kept as transparency" in one.reason for one in told] == [True]


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("shape", [(60, 80), (60, 60)], ids=["oblong", "square"])
@pytest.mark.parametrize("own_turn", [False, True], ids=["plain-mask", "turned-mask"])
def test_a_mask_that_may_be_of_the_picture_as_stored_is_said(tmp_path, tag, shape, own_turn):
    exif = Image.Exif()
    exif[0x0112] = tag
    image = written(tmp_path / "image.png", np.zeros((*shape, 3), np.uint8), exif=exif)
    ids = TWO[: shape[0], : shape[1]]
    ids = ids if tag < 5 or own_turn else np.ascontiguousarray(ids.T)
    mask = written(tmp_path / "mask.png", ids, **({"exif": exif} if own_turn else {}))
    _, told = told_by(MaskedImage("set/a", image, mask).load)
    unclear = tag > 1 and (tag < 5 or shape == (60, 60)) and not own_turn
    assert ["EXIF data turn the picture" in one.reason for one in told] == [True] * unclear
