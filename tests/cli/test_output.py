"""Results appear all together or not at all, and never over what somebody else has made."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stable_sam_cuda.cli import output
from stable_sam_cuda.cli.output import Outputs, Results
from stable_sam_cuda.cli.ownership import read_sealed, sealed

SOURCE = {"verb": "test", "photo_sha256": "a"}


@contextmanager
def claimed(
    folder: Path,
    stem: str = "cat",
    suffixes: tuple[str, ...] = ("_mask.png",),
    source: dict = SOURCE,
    **options: object,
) -> Iterator[Results]:
    with Outputs(folder, **options) as outputs:
        yield outputs.claim(stem, suffixes, source)


def fill(results: Results, value: int = 1, **record: object) -> None:
    for name in results.names:
        results.picture(name, Image.new("L", (2, 2), value))
    results.publish({"value": value, **record})


def run(folder: Path, value: int = 1, **options: object) -> Results:
    with claimed(folder, **options) as results:
        fill(results, value)
    return results


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def test_files_appear_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with claimed(target) as results:
        results.picture("cat_mask.png", Image.new("L", (2, 2)))
        assert not (target / "cat_mask.png").exists()
        results.publish({"score": 0.5})
    assert sorted(path.name for path in target.iterdir()) == ["cat.json", "cat_mask.png"]
    assert json.loads((target / "cat.json").read_text())["score"] == 0.5


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, SystemExit, None], ids=str)
def test_nothing_is_left_without_publishing(tmp_path: Path, ending: type[BaseException] | None) -> None:
    def work() -> None:
        with claimed(tmp_path / "a" / "b") as results:
            results.picture("cat_mask.png", Image.new("L", (2, 2)))
            if ending is not None:
                raise ending

    if ending is None:
        work()
    else:
        with pytest.raises(ending):
            work()
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_is_no_json_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError), claimed(tmp_path) as results:
        fill(results, 2, score=float("nan"))
    assert contents(tmp_path) == before


def test_the_same_again_replaces_its_own(tmp_path: Path) -> None:
    run(tmp_path, 1)
    run(tmp_path, 2)
    assert Image.open(tmp_path / "cat_mask.png").getpixel((0, 0)) == 2


def drawn(folder: Path) -> None:
    (folder / "cat_mask.png").write_bytes(b"drawn by hand")


def labelme(folder: Path) -> None:
    (folder / "cat.json").write_text('{"shapes": []}')


def edited_mask(folder: Path) -> None:
    run(folder)
    (folder / "cat_mask.png").write_bytes(b"edited")


def edited_record(folder: Path) -> None:
    run(folder)
    record = json.loads((folder / "cat.json").read_text())
    (folder / "cat.json").write_text(json.dumps(record | {"value": 7}))


def other_picture(folder: Path) -> None:
    run(folder, source={"verb": "test", "photo_sha256": "b"})


def other_verb(folder: Path) -> None:
    run(folder, source={"verb": "other", "photo_sha256": "a"})


def mask_without_record(folder: Path) -> None:
    run(folder)
    (folder / "cat.json").unlink()


def link(folder: Path) -> None:
    (folder / "mine.png").write_bytes(b"mine")
    (folder / "cat_mask.png").symlink_to("mine.png")


def dangling_link(folder: Path) -> None:
    (folder / "cat.json").symlink_to("nowhere")


def deep_json(folder: Path) -> None:
    (folder / "cat.json").write_text("[" * 100_000)


OTHERS = [drawn, labelme, edited_mask, edited_record, other_picture, other_verb, mask_without_record]
OTHERS += [link, dangling_link, deep_json]


@pytest.mark.parametrize("prepare", OTHERS, ids=lambda one: one.__name__)
def test_what_is_not_ours_is_kept_unless_told(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"--out .* got cat.*\(--overwrite replaces them\)"), claimed(tmp_path):
        pytest.fail("the names were given away")
    assert contents(tmp_path) == before
    run(tmp_path, 5, overwrite=True)
    assert Image.open(tmp_path / "cat_mask.png").getpixel((0, 0)) == 5
    assert not (tmp_path / "mine.png").exists() or (tmp_path / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_name_taken_by_a_directory(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out" / "cat.json").mkdir(parents=True)
    with (
        pytest.raises(OSError, match="got a directory there"),
        claimed(tmp_path / "out", overwrite=overwrite),
    ):
        pytest.fail("the names were given away")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat.json"]


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    run(tmp_path)
    mask = tmp_path / "cat_mask.png"
    with (
        pytest.raises(FileExistsError, match=r"cat_mask\.png is itself an input"),
        claimed(tmp_path, overwrite=True, keep=[mask]),
    ):
        pytest.fail("the names were given away")


def test_names_of_one_run_that_a_file_system_would_not_tell_apart(tmp_path: Path) -> None:
    with Outputs(tmp_path) as outputs:
        outputs.claim("cat", [], SOURCE)
        for other in ("cat", "Cat"):
            with pytest.raises(FileExistsError, match="expected names of their own"):
                outputs.claim(other, [], SOURCE)


def test_files_that_this_run_does_not_have_go_if_they_are_ours(tmp_path: Path) -> None:
    run(tmp_path, suffixes=("_1.png", "_2.png", "_3.png"))
    (tmp_path / "cat_3.png").write_bytes(b"edited")
    results = run(tmp_path, 2, suffixes=("_1.png",))
    assert results.removed == ["cat_2.png"]
    assert sorted(contents(tmp_path)) == ["cat.json", "cat_1.png", "cat_3.png"]


def test_names_that_a_record_may_not_have(tmp_path: Path) -> None:
    """A record from elsewhere cannot make this package remove files of other folders or other names."""
    victims = [tmp_path / "other.png", tmp_path / "out" / "dog.png"]
    run(tmp_path / "out")
    for victim in victims:
        victim.write_bytes(b"")
    record = json.loads((tmp_path / "out" / "cat.json").read_text())
    digest = output.state_of(victims[0])
    del record["record_sha256"]
    record["files"] |= {"../other.png": digest, "cat/../../other.png": digest, "dog.png": digest}
    (tmp_path / "out" / "cat.json").write_text(json.dumps(output.sealed(record)))
    assert run(tmp_path / "out").removed == []
    assert all(victim.exists() for victim in victims)


def test_a_file_that_appears_during_the_work_is_kept(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(OSError, match="another file has come there meanwhile"), claimed(tmp_path) as results:
        (tmp_path / "cat.json").write_text("mine")
        fill(results, 2)
    assert (tmp_path / "cat.json").read_text() == "mine"
    assert Image.open(tmp_path / "cat_mask.png").getpixel((0, 0)) == 1


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("links", [True, False], ids=["hard_links", "no_hard_links"])
def test_a_failure_while_moving_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, links: bool
) -> None:
    """Whichever of the files cannot be moved: those before it go back."""
    run(tmp_path, suffixes=("_1.png", "_old.png"))
    before = contents(tmp_path)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(1, "Operation not permitted")

    with Outputs(tmp_path) as outputs:
        results = outputs.claim("cat", ("_1.png", "_2.png"), SOURCE)
        set_aside, count = results._set_aside, 0

        def failing(name: str, backups: Path) -> Path | None:
            nonlocal count
            count += 1
            if count > place:
                raise OSError(28, "No space left on device")
            return set_aside(name, backups)

        monkeypatch.setattr(results, "_set_aside", failing)
        if not links:
            monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(OSError, match=r"--out .*: expected to write cat.*, got: No space left on device"):
            fill(results, 2)
    assert contents(tmp_path) == before


def test_without_hard_links_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *arguments, **options: (_ for _ in ()).throw(OSError(1, "no links")))
    run(tmp_path, 1)
    run(tmp_path, 2)
    assert Image.open(tmp_path / "cat_mask.png").getpixel((0, 0)) == 2


def test_a_set_can_be_published_once_more(tmp_path: Path) -> None:
    with claimed(tmp_path) as results:
        fill(results, 1)
        fill(results, 2)
        with pytest.raises(OSError, match="meanwhile"):
            (tmp_path / "cat_mask.png").write_bytes(b"edited")
            fill(results, 3)
    assert json.loads((tmp_path / "cat.json").read_text())["value"] == 2
    assert (tmp_path / "cat_mask.png").read_bytes() == b"edited"


@pytest.mark.parametrize("below", ["file/below", "file", "file/a/b"])
def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out .*file.*: expected a directory that can be written to"):
        Outputs(tmp_path / below).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_missing_parent_is_named() -> None:
    with pytest.raises(OSError, match=r"--out /proc/nope: expected .* in /proc$"):
        Outputs(Path("/proc/nope")).__enter__()


def test_a_name_too_long_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"--out .*: expected to write ccc"), claimed(tmp_path, stem="c" * 250):
        pytest.fail("the names were given away")


def test_too_little_space_is_told_at_once(tmp_path: Path) -> None:
    with Outputs(tmp_path) as outputs, pytest.raises(OSError, match=r"expected about .* KiB of space"):
        outputs.claim("cat", [], SOURCE, room=2**70)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_record_with_any_byte_changed_is_not_ours_or_says_the_same(place: int, value: int) -> None:
    with TemporaryDirectory() as name:
        path = Path(name, "cat.json")
        record = sealed({"source": {"verb": "test"}, "files": {"cat_mask.png": "0" * 64}, "score": 0.25})
        content = bytearray(json.dumps(record, indent=2).encode())
        content[place % len(content)] = value
        path.write_bytes(content)
        read = read_sealed(path)
        assert read is None or {**read, "record_sha256": record["record_sha256"]} == record
