"""Trees with links, hidden and odd names: every real folder and every real picture once."""

import os
import shutil
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stable_sam_cuda.data.dataset import check_samples, find_masked_images
from stable_sam_cuda.data.walk import walk
from stable_sam_cuda.notes import DataWarning

SQUARE = np.zeros((16, 24), np.uint8)
SQUARE[4:10, 5:15] = 1


def put(folder, *stems):
    """A set with pictures and masks of these stems in ``folder``."""
    for kind, pixels in (("images", np.repeat(SQUARE[..., None], 3, 2) * 200), ("masks", SQUARE)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for stem in stems:
            Image.fromarray(pixels).save(folder / kind / f"{stem}.png")


def noted(action):
    """What ``action`` returns, and what it noted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(one.message) for one in caught if issubclass(one.category, DataWarning)]


def names_below(root):
    found, notes = noted(lambda: find_masked_images(root))
    good, broken = check_samples(found)
    assert not broken
    return [one.name for one in good], notes


@pytest.mark.parametrize("target", ["..", ".", "../set", "{root}", "images"])
def test_a_link_to_a_folder_of_the_tree_shows_nothing_twice_and_is_counted(target, tmp_path):
    root = tmp_path / "data"
    put(root / "set", "a", "b")
    os.symlink(target.format(root=root), root / "set" / "again")
    names, notes = names_below(root)
    assert names == ["set/a", "set/b"]
    assert len(notes) == 1
    assert "data/set/again: links to folders that are used under another name are left out: 1" in notes[0]


def test_links_to_each_other_and_to_themselves_end(tmp_path):
    put(tmp_path / "set", "a")
    for link, target in (("x", "y"), ("y", "x"), ("self", "self"), ("gone", "nowhere")):
        os.symlink(target, tmp_path / link)
    names, notes = names_below(tmp_path)
    assert names == ["set/a"]
    assert "links that lead nowhere are left out: 4" in notes[0]


def test_folders_elsewhere_are_followed_once_by_the_plainest_link(tmp_path):
    root = tmp_path / "data"
    put(tmp_path / "elsewhere", "a")
    os.symlink("../elsewhere/deeper", tmp_path / "elsewhere" / "masks" / "none")
    (root / "deep" / "er").mkdir(parents=True)
    os.symlink(tmp_path / "elsewhere", root / "deep" / "er" / "a")
    os.symlink(tmp_path / "elsewhere", root / "z")
    os.symlink(root, tmp_path / "elsewhere" / "back")
    names, _ = names_below(root)
    assert names == ["z/a"]


def test_linked_pictures_and_linked_kinds_of_folders_are_found(tmp_path):
    root = tmp_path / "data"
    put(tmp_path / "store", "a", "b")
    (root / "one").mkdir(parents=True)
    for kind in ("images", "masks"):
        os.symlink(tmp_path / "store" / kind, root / "one" / kind)
    (root / "two" / "images").mkdir(parents=True)
    put(root / "two", "c")
    os.symlink(root / "two" / "images" / "c.png", root / "two" / "images" / "d.png")
    shutil.copy(root / "two" / "masks" / "c.png", root / "two" / "masks" / "d.png")
    os.link(root / "two" / "images" / "c.png", root / "two" / "images" / "e.png")
    shutil.copy(root / "two" / "masks" / "c.png", root / "two" / "masks" / "e.png")
    names, notes = names_below(root)
    assert names == ["one/a", "one/b", "two/c"]
    assert any("pictures that are used under another name" in note and "left out: 2" in note for note in notes)


def test_masks_that_another_set_has_too_can_be_linked(tmp_path):
    put(tmp_path / "first", "a")
    put(tmp_path / "second", "a")
    shutil.rmtree(tmp_path / "second" / "masks")
    os.symlink("../first/masks", tmp_path / "second" / "masks")
    assert names_below(tmp_path)[0] == ["first/a", "second/a"]


@pytest.mark.parametrize(
    "name",
    [".hidden", "._set", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found",
     ".ipynb_checkpoints", ".git"],
)  # fmt: skip
def test_hidden_and_system_folders_are_left_out_and_counted(name, tmp_path):
    put(tmp_path / "set", "a")
    put(tmp_path / name, "b")
    put(tmp_path / "set" / "images" / name, "c")
    names, notes = names_below(tmp_path)
    assert names == ["set/a"]
    assert "hidden and system files and folders are left out: 2" in notes[0]


@pytest.mark.parametrize("name", ["._a.png", ".b.png", "Thumbs.db", ".DS_Store", "desktop.ini"])
def test_hidden_and_system_files_are_left_out_and_counted(name, tmp_path):
    put(tmp_path / "set", "a")
    (tmp_path / "set" / "images" / name).write_bytes(b"\x00\x05\x16\x07")
    names, notes = names_below(tmp_path)
    assert names == ["set/a"]
    assert "hidden and system files and folders are left out: 1" in notes[0]


def test_folders_that_cannot_be_listed_are_counted_and_the_root_is_an_error(tmp_path, monkeypatch):
    put(tmp_path / "open", "a")
    put(tmp_path / "shut", "b")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == refuse.name:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refuse.name = "shut"
    names, notes = names_below(tmp_path)
    assert names == ["open/a"]
    assert "shut: folders that cannot be listed (Permission denied) are left out: 1" in notes[0]
    refuse.name = tmp_path.name
    with pytest.raises(OSError, match=r"data: expected a folder that can be listed, got .*: Permission denied"):
        find_masked_images(tmp_path)


def test_pipes_and_sockets_are_left_out(tmp_path, monkeypatch):
    put(tmp_path, "a")
    os.mkfifo(tmp_path / "images" / "b.png")
    monkeypatch.chdir(tmp_path / "images")  # the names of sockets must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("c.png")
        names, notes = names_below(tmp_path)
    assert names == [f"{tmp_path.name}/a"]
    assert "devices, pipes and sockets are left out: 2" in notes[0]


def test_a_link_out_of_the_tree_is_followed_and_the_tree_in_it_is_not_walked_again(tmp_path):
    put(tmp_path / "data" / "set", "a")
    put(tmp_path / "beside", "b")
    os.symlink("../..", tmp_path / "data" / "set" / "above")
    names, notes = names_below(tmp_path / "data")
    assert names == ["set/a", "set/above/beside/b"]
    assert "above/data: folders that are used under another name are left out: 1" in notes[0]


def test_the_root_may_be_a_link_or_hidden(tmp_path):
    put(tmp_path / ".store", "a")
    os.symlink(".store", tmp_path / "data")
    assert names_below(tmp_path / "data")[0] == [".store/a"]
    assert names_below(tmp_path / ".store")[0] == [".store/a"]


def test_a_deep_tree_is_walked_to_its_end(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 300)
    os.makedirs(deep)
    put(deep, "a")
    assert len(names_below(tmp_path)[0]) == 1


# A tree of up to 12 folders, each in an earlier one; sets in some; links from some to others, or to pictures.
PARENTS = st.lists(st.integers(0, 30), min_size=1, max_size=11)
PLACES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(parents=PARENTS, sets=st.sets(st.integers(0, 30), min_size=1, max_size=5), links=PLACES, pictures=PLACES)
def test_every_real_folder_and_every_real_picture_is_there_once(parents, sets, links, pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    folders = [root]
    for number, parent in enumerate(parents):
        folders.append(folders[parent % len(folders)] / f"f{number}")
        folders[-1].mkdir()
    put(root / "a_set", "first")
    real = {root / "a_set" / "images" / "first.png"}
    for number in sets:
        folder = folders[number % len(folders)]
        put(folder, f"p{number}")
        real.add(folder / "images" / f"p{number}.png")
    for number, (source, target) in enumerate(links):
        os.symlink(folders[target % len(folders)], folders[source % len(folders)] / f"l{number}")
    for number, (source, target) in enumerate(pictures):
        images = sorted(real)[source % len(real)].parent
        os.symlink(sorted(real)[target % len(real)], images / f"q{number}.png")
        shutil.copy(root / "a_set" / "masks" / "first.png", images.parent / "masks" / f"q{number}.png")
    found, _ = noted(lambda: find_masked_images(root))
    assert sorted(os.path.realpath(one.image) for one in found) == sorted(map(os.path.realpath, real))
    tree, _ = noted(lambda: walk(root))
    paths = [os.path.realpath(folder.path) for folder in tree.below()]
    assert len(paths) == len(set(paths))
    assert set(map(str, folders)) <= set(paths)
    shutil.rmtree(root)
