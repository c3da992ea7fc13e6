"""What is loaded is the process's own: whatever becomes of the file afterwards, or while it is read."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from segment_anything import sam_model_registry

from stable_sam_cuda import DeformableSampler, load_plugin, load_sam, save_plugin
from stable_sam_cuda.sam import weight_files
from stable_sam_cuda.sam.lite import build_sam_lite, new_sam_lite
from stable_sam_cuda.sam.weight_files import DTYPES, read_pytorch, read_safetensors

READERS = ("vit-pth", "vit-legacy", "vit-safetensors", "sam_lite", "plugin")


def written(kind, sam, folder):
    """A file of this kind, and the function that reads it into a module."""
    if kind == "sam_lite":
        path = folder / "lite.safetensors"
        save_file(new_sam_lite().state_dict(), path, metadata={"model": "sam_lite", "variant": "lite0"})
        return path, lambda: build_sam_lite(path)
    if kind == "plugin":
        path = folder / "plugin.safetensors"
        save_plugin(DeformableSampler(), path)
        return path, lambda: load_plugin(path)
    path = folder / ("sam.safetensors" if kind == "vit-safetensors" else "sam.pth")
    if kind == "vit-safetensors":
        save_file(sam.state_dict(), path)
    else:
        torch.save(sam.state_dict(), path, _use_new_zipfile_serialization=kind == "vit-pth")
    return path, lambda: load_sam("vit_b", path, device="cpu")


@pytest.fixture(params=READERS)
def file_and_reader(request, monkeypatch, build_small_sam, sam, tmp_path):
    monkeypatch.setitem(sam_model_registry, "vit_b", build_small_sam)
    return written(request.param, sam, tmp_path)


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_still(module, before):
    assert [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])] == []


def test_nothing_of_the_file_stays_mapped(file_and_reader):
    path, read = file_and_reader
    module = read()
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) not in maps.read_text()
    before = copied(module)
    size = path.stat().st_size
    with path.open("r+b") as file:  # another program writes in place
        file.write(b"\xff" * size)
    assert_still(module, before)
    os.truncate(path, 0)  # and cuts it: a mapped file would kill the process here
    assert_still(module, before)


def test_a_model_is_saved_over_the_file_it_came_from(file_and_reader):
    path, read = file_and_reader
    module = read()
    before = copied(module)
    if path.suffix == ".pth":
        torch.save(module.state_dict(), path)
        assert_still(module, before)
        assert_still(module, torch.load(path, weights_only=True))
    elif isinstance(module, DeformableSampler):
        save_plugin(module, path)
        assert_still(load_plugin(path), before)
    else:
        save_file(module.state_dict(), path)
        assert_still(module, before)
        assert_still(module, load_file(path))


@pytest.mark.parametrize("change", ["written", "cut", "lengthened"])
def test_a_file_that_changes_while_it_is_read_is_refused(file_and_reader, monkeypatch, change):
    path, read = file_and_reader
    changed = []

    def and_change(function):
        def changing(*arguments, **keywords):
            if not changed:
                changed.append(change)
                os.utime(path, (1, 1))  # the clock of a file system ticks slower than this test runs
                with path.open("r+b") as file:
                    if change == "written":
                        file.write(b"other")
                    else:
                        file.truncate(100 if change == "cut" else 10**9)
            return function(*arguments, **keywords)

        return changing

    monkeypatch.setattr(torch, "load", and_change(torch.load))
    monkeypatch.setattr(weight_files, "_read_tensors", and_change(weight_files._read_tensors))
    with pytest.raises(ValueError, match=rf"expected a file that stays as it is, got {path}, which another program"):
        read()


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    true_reader = weight_files._read_tensors

    def replacing(file):
        save_file({"a": torch.zeros(3)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        return true_reader(file)

    monkeypatch.setattr(weight_files, "_read_tensors", replacing)
    assert torch.equal(read_safetensors(path, "checkpoint")[0]["a"], torch.arange(1000.0))


TENSORS = {
    **{name: torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype) for name, dtype in DTYPES.items()},
    "nothing": torch.zeros(0, 3),
    "one number": torch.tensor(2.5),
    "half of one": torch.tensor(2.5, dtype=torch.bfloat16),
    "ünnamed": torch.rand(5, 7),
}


def test_every_dtype_and_shape_is_what_the_library_reads(tmp_path):
    path = tmp_path / "all.safetensors"
    save_file(TENSORS, path, metadata={"a": "b"})
    found, metadata = read_safetensors(path, "checkpoint")
    assert metadata == {"a": "b"} and found.keys() == TENSORS.keys()
    for name, tensor in load_file(path).items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


HEADERS = {
    "no-object": [],
    "text": "a",
    "entry-of-text": {"a": "b"},
    "entry-of-nothing": {"a": {}},
    "no-such-dtype": {"a": entry(dtype="F7")},
    "list-as-dtype": {"a": entry(dtype=["F32"])},
    "negative-size": {"a": entry(shape=[-2, -3])},
    "fraction": {"a": entry(shape=[2.0, 3])},
    "huge": {"a": entry(shape=[2**40, 2**20], data_offsets=[0, 2**62])},
    "too-long": {"a": entry(shape=[20, 3], data_offsets=[0, 240])},
    "other-length": {"a": entry(data_offsets=[0, 20])},
    "gap": {"a": entry(shape=[1], data_offsets=[4, 8])},
    "overlap": {"a": entry(), "b": entry()},
    "more-behind": {"a": entry(shape=[2], data_offsets=[0, 8])},
    "metadata-of-numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata-of-text": {"__metadata__": "a", "a": entry()},
    "three-offsets": {"a": entry(data_offsets=[0, 24, 24])},
    "offsets-of-text": {"a": entry(data_offsets=["0", "24"])},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(ValueError, match=rf"checkpoint: expected a whole \.safetensors file, got {path}: "):
        read_safetensors(path, "checkpoint")


WHOLE = save({"a": torch.rand(3, 4), "b": torch.rand(5)}, {"model": "x"})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255), end=st.integers(0, len(WHOLE)))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, place, value, end):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    for content in (WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :], WHOLE[:end]):
        path.write_bytes(content)
        try:
            tensors, _ = read_safetensors(path, "checkpoint")
        except ValueError as error:
            assert str(error).startswith(f"checkpoint: expected a whole .safetensors file, got {path}")
        else:
            assert len(content) == len(WHOLE) and all(isinstance(one, torch.Tensor) for one in tensors.values())


@pytest.mark.parametrize("read", [read_pytorch, read_safetensors])
def test_a_folder_and_no_file_are_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"weights: expected a file, got .*, which is a folder"):
        read(tmp_path, "weights")
    with pytest.raises(FileNotFoundError, match=r"weights: expected a file, got .*nope, which does not exist"):
        read(tmp_path / "nope", "weights")
