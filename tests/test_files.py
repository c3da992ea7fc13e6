"""Files that appear whole or not at all, in whatever way the writing ends."""

import errno
import os
import stat
import sys
import threading

import pytest

from stable_sam_cuda import files
from stable_sam_cuda.files import atomic_write, require_folder


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


def test_a_file_is_there_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_the_file_before(error, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("before", [None, b"old"], ids=["new", "replaced"])
def test_ctrl_c_at_any_line_leaves_the_old_file_or_the_new_one(before, tmp_path):
    """Raised by a trace function at one line after the other of what runs inside."""
    path, place, outcomes = tmp_path / "a", 0, set()
    while True:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        interrupted = _write_interrupted(path, place)
        found = path.read_bytes() if path.exists() else None
        assert found in (before, b"new"), place
        assert set(os.listdir(tmp_path)) <= {"a"}, place
        outcomes.add(found)
        place += 1
        if not interrupted:
            break
    assert outcomes == {before, b"new"}
    assert place > 15


def _write_interrupted(path, place):
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == place + 1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        write(path)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_an_error_that_names_the_file(call, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match=r"No space left on device.*/a"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_that_open_gives(mask, tmp_path):
    before = os.umask(mask)
    try:
        write(tmp_path / "a")
        (tmp_path / "b").write_bytes(b"by open")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_private_file_that_is_replaced_stays_private(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o600)
    write(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("exists", [True, False], ids=["file", "dangling"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(exists, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "a"
    if exists:
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("elsewhere/a")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "elsewhere") == ["a"]


def test_a_link_to_itself_and_a_folder_are_errors_that_name_the_path(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"symbolic links.*loop"):
        write(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        write(tmp_path)


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write(tmp_path / "pipe")
    reader.join()
    assert found == [b"new"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "a[b]*", " ", os.fsdecode(b"caf\xe9")], ids=ascii)
def test_any_name_that_a_file_can_have_can_be_written(name, tmp_path):
    with atomic_write(tmp_path / name) as file:
        file.write(b"new")
        assert len(list(files.partial_files(tmp_path / name))) == 1
    assert (tmp_path / name).read_bytes() == b"new"


def test_a_folder_that_cannot_be_made_is_named_with_the_one_above(tmp_path):
    require_folder("out", tmp_path / "new" / "deep")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: expected a folder that can be written, got .*made in .*/file: Not a"):
        require_folder("out", tmp_path / "file" / "new" / "deep")
    with pytest.raises(ValueError, match=r"out: .*got .*/file: (File exists|Not a directory)"):
        require_folder("out", tmp_path / "file")
    require_folder("cache", tmp_path / "later" / "deep", make=False)
    assert not (tmp_path / "later").exists()
    with pytest.raises(ValueError, match=r"cache: .* cannot be made in .*/file: Not a directory"):
        require_folder("cache", tmp_path / "file" / "a", make=False)
