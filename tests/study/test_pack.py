"""Packing: what comes out is what went in, smaller; what is damaged, missing or unsafe is refused by name."""

import io
import json
import shutil
import tarfile

import cv2
import numpy as np
import pytest
from pack import pack, unpack
from pack_parts import read_parts, write_parts

from stable_sam_cuda.data.dataset import find_masked_images, fit_square

SMALL_PART = 24 * 1024  # of which the end of a tar may take 10


@pytest.fixture(scope="module")
def data(picture_folder, tmp_path_factory):
    """The drawn pictures with splits, one of them with an object of a single pixel."""
    root = tmp_path_factory.mktemp("packed") / "data"
    shutil.copytree(picture_folder, root)
    path = root / "ovals" / "masks" / "3.png"
    ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    numbered = np.arange(ids.size, dtype=np.int32).reshape(ids.shape)
    scale = 48 / max(ids.shape)
    kept = cv2.resize(numbered, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    ids.flat[np.setdiff1d(numbered, kept)[0]] = 7
    cv2.imwrite(str(path), ids)
    names = [f"{part}/{stem}" for part in ("ellipses", "ovals") for stem in range(4)]
    (root / "splits.json").write_text(json.dumps({"train": names[:5], "val": names[5:6], "test": names[6:]}))
    return root


@pytest.fixture(scope="module")
def packs(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("packs")
    pack(data, out, 48, SMALL_PART)
    return out


def test_a_round_trip_keeps_names_splits_and_ids(data, packs, tmp_path):
    assert unpack(packs, tmp_path) == 17
    assert (tmp_path / "ovals" / "images" / "3.jpg").is_file()
    for split in ("train", "val", "test"):
        before, after = (find_masked_images(root, split) for root in (data, tmp_path))
        assert [sample.name for sample in after] == [sample.name for sample in before]
        for old, new in zip(before, after, strict=True):
            (image, ids), (small, small_ids) = old.load(), new.load()
            assert max(small_ids.shape) == 48
            assert set(np.unique(small_ids)) == set(np.unique(ids)) - {7}
            framed, framed_ids = fit_square(image, ids, 48)
            height, width = small_ids.shape
            assert np.array_equal(small_ids, framed_ids[:height, :width])
            assert np.abs(small.astype(int) - framed[:height, :width]).mean() < 12  # JPEG, on noise


def test_unpacking_again_writes_nothing_and_mends_what_was_damaged(packs, tmp_path):
    unpack(packs, tmp_path)
    (tmp_path / "ovals" / "images" / "1.jpg").write_bytes(b"half a file")
    assert unpack(packs, tmp_path) == 1
    assert unpack(packs, tmp_path) == 0


def test_an_object_that_vanishes_is_named(data, tmp_path):
    _, vanished = pack(data, tmp_path, 48, SMALL_PART)
    assert vanished == {"ovals/3": [7]}
    assert json.loads((tmp_path / "vanished.json").read_text()) == {"ovals/3": [7]}


def test_parts_are_bounded_and_the_same_bytes_each_time(data, packs, tmp_path):
    pack(data, tmp_path, 48, SMALL_PART)
    files = sorted(path.name for path in packs.iterdir())
    assert sum(name.endswith(".tar") for name in files) > 1
    assert files == sorted(path.name for path in tmp_path.iterdir())
    assert all((packs / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)
    assert all((packs / name).stat().st_size <= SMALL_PART for name in files)


def test_only_the_splits_that_are_asked_for(data, tmp_path):
    pack(data, tmp_path / "packs", 48, 2**20, ["val", "test"])
    unpack(tmp_path / "packs", tmp_path / "data")
    assert len(find_masked_images(tmp_path / "data")) == 3
    assert list(json.loads((tmp_path / "data" / "splits.json").read_text())) == ["val", "test"]


def test_pictures_are_never_enlarged(data, tmp_path):
    pack(data, tmp_path / "packs", 512, 2**20)
    unpack(tmp_path / "packs", tmp_path / "data")
    for before, after in zip(find_masked_images(data), find_masked_images(tmp_path / "data"), strict=True):
        assert np.array_equal(before.load()[1], after.load()[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size: expected at least 32 px, got 8"),
        ({"quality": 0}, "quality: expected 1 to 100, got 0"),
        ({"part_bytes": 11_000}, "part-mib: expected parts that hold every file"),
        ({"splits": ["dessert"]}, "split: expected one of"),
    ],
    ids=["size", "quality", "part", "split"],
)
def test_bad_arguments_are_named(options, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        pack(**{"data": data, "out": tmp_path, "size": 48, "part_bytes": SMALL_PART, **options})
    assert not list(tmp_path.glob("part-*.json"))


def test_a_folder_with_parts_is_not_packed_into(data, packs):
    with pytest.raises(ValueError, match=r"out: expected a folder without parts, got .* with part-00"):
        pack(data, packs, 48, SMALL_PART)


def test_ids_that_would_be_read_as_something_else_are_refused(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / "data" / "set" / folder).mkdir(parents=True)
    ids = np.zeros((40, 40), np.uint16)
    ids[:9], ids[20:] = 3, 300
    cv2.imwrite(str(tmp_path / "data" / "set" / "masks" / "0.png"), ids)
    cv2.imwrite(str(tmp_path / "data" / "set" / "images" / "0.png"), np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(ValueError, match="set/0: expected ids up to 255"):
        pack(tmp_path / "data", tmp_path / "packs", 64, 2**20)


def damaged(packs, tmp_path, change):
    folder = tmp_path / "packs"
    shutil.copytree(packs, folder)
    change(folder)
    return folder


def changed_byte(folder):
    content = bytearray((folder / "part-01.tar").read_bytes())
    content[700] ^= 1
    (folder / "part-01.tar").write_bytes(content)


def of_another_pack(folder):
    manifest = json.loads((folder / "part-01.json").read_text())
    (folder / "part-01.json").write_text(json.dumps(manifest | {"pack": "other"}))


def another_format(folder):
    (folder / "part-00.json").write_text('{"format": "zip"}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_byte, "expected SHA-256 .* of .*part-01.tar, got"),
        (lambda folder: (folder / "part-01.tar").unlink(), "missing are part-01.tar"),
        (lambda folder: (folder / "part-00.json").unlink(), "missing are part-00.json"),
        (lambda folder: (folder / "part-00.json").write_text("{"), "expected a manifest in .*part-00.json"),
        (of_another_pack, "expected parts of one pack"),
        (another_format, "expected a manifest of stable_sam_cuda.pack, version 1"),
        (lambda folder: [path.unlink() for path in folder.glob("*.json")], "found none"),
    ],
    ids=["changed", "no tar", "no manifest", "broken manifest", "mixed", "format", "no manifests"],
)
def test_parts_that_are_not_whole_are_refused(change, message, packs, tmp_path):
    with pytest.raises(ValueError, match=message):
        unpack(damaged(packs, tmp_path, change), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "name", ["../images/0.jpg", "/set/images/0.jpg", "set/images/../../../0.jpg", "set/images/0.py", "images/0.jpg"]
)
def test_members_with_unsafe_names_are_refused(name, tmp_path):
    write_parts([("set/images/1.jpg", b"fine"), (name, b"not")], tmp_path / "packs", 2**20)
    with pytest.raises(ValueError, match="unpack: expected plain files named as in a pack, got"):
        unpack(tmp_path / "packs", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_links_are_refused(tmp_path):
    write_parts([("set/images/1.jpg", b"fine")], tmp_path, 2**20)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        link = tarfile.TarInfo("set/images/1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "link").mkdir()
    write_parts([("x", b"")], tmp_path / "link", 2**20)
    _replace_first_part(tmp_path / "link", content.getvalue())
    with pytest.raises(ValueError, match=r"got 'set/images/1\.jpg'"):
        list(read_parts(tmp_path / "link"))


def _replace_first_part(folder, content):
    """As one who forges manifests, too, would."""
    from hashlib import sha256

    (folder / "part-00.tar").write_bytes(content)
    digest = sha256(content).hexdigest()
    manifest = json.loads((folder / "part-00.json").read_text())
    manifest |= {"sha256": digest, "pack": sha256(digest.encode()).hexdigest()}
    (folder / "part-00.json").write_text(json.dumps(manifest))
