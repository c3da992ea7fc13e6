"""Broken pictures are said, counted and left out."""

import numpy as np
import pytest
from PIL import Image

from stable_sam_cuda.cli.samples import check_data, usable_samples
from stable_sam_cuda.data.dataset import find_masked_images


@pytest.fixture
def folder(tmp_path):
    """A set whose picture ``bad[1]`` has a mask of another size."""
    root = tmp_path / "set"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for stem, side in (("good", 8), ("bad[1]", 9)):
        Image.new("RGB", (8, 8)).save(root / "images" / f"{stem}.png")
        Image.fromarray(np.ones((side, side), np.uint8)).save(root / "masks" / f"{stem}.png")
    return root


def test_each_broken_picture_has_a_line_and_the_rest_is_used(folder, capsys):
    good = usable_samples(find_masked_images(folder))
    assert [sample.name for sample in good] == ["set/good"]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "skipped set/bad[1]: picture has size (8, 8), its mask (9, 9)",
        "note: 1 of 2 pictures skipped",
    ]
    assert printed.out == ""


def test_nothing_usable_is_an_error_that_names_the_first(folder):
    (folder / "images" / "good.png").unlink()
    with pytest.raises(ValueError, match=r"--data: .* got 2 broken ones; the first, set/bad\[1\]: picture has size"):
        usable_samples(find_masked_images(folder))


@pytest.mark.parametrize("split", [None, "val"], ids=["data", "split"])
def test_what_is_not_there_is_named_by_its_option(split, tmp_path):
    data = tmp_path / "nope" if split is None else tmp_path
    with pytest.raises(FileNotFoundError, match="^--data: expected" if split is None else "^--split: expected"):
        check_data(data, split)
