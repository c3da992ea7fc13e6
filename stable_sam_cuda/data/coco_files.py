"""COCO files: their entries checked one by one, so that a broken one costs itself alone."""

import os
import posixpath
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from stable_sam_cuda.data.picture import MAX_PIXELS
from stable_sam_cuda.files import read_json
from stable_sam_cuda.notes import note, printable

Annotation = dict[str, Any]

CROWDS = ("skip", "use")


class NotCocoError(ValueError):
    """A JSON file that holds something else."""


@dataclass
class CocoEntry:
    """One picture that a COCO file lists, with the annotations of its objects and of its crowds."""

    number: int | str | float
    file_name: str
    height: int
    width: int
    annotations: list[Annotation] = field(default_factory=list)
    crowds: list[Annotation] = field(default_factory=list)


def read_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO file: a dictionary whose ``images`` and ``annotations`` are lists.

    Raises:
        ValueError: it is not JSON, or these are no lists.
        NotCocoError: it is JSON, but not COCO's.
        OSError: it cannot be read.
    """
    content = read_json(path, "a COCO file")
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise NotCocoError(f"{printable(path)}: expected a COCO file with images and annotations, got other JSON")
    for name in ("images", "annotations"):
        if not isinstance(content[name], list):
            raise ValueError(f"{printable(path)}: {name}: expected a list, got {reprlib.repr(content[name])}")
    return content


def read_entries(path: Path, crowds: str = "skip") -> list[CocoEntry]:
    """The pictures of a COCO file that have an object, in the order of the file.

    What is left out is noted: broken entries and annotations one by one, crowds and pictures without an annotation
    by their number.

    Args:
        crowds: ``skip`` leaves annotations marked ``iscrowd`` out, ``use`` takes them as objects.

    Raises:
        ValueError, OSError: as `read_coco`; ``crowds`` is another word; or no picture with an object is left.
    """
    if crowds not in CROWDS:
        raise ValueError(f"crowds: expected one of {', '.join(CROWDS)}, got {crowds!r}")
    content = read_coco(path)
    try:
        return _sound_entries(path, content, crowds)
    except RecursionError as error:
        raise ValueError(f"{printable(path)}: expected a COCO file, got JSON that is nested too deeply") from error


def _sound_entries(path: Path, content: dict[str, Any], crowds: str) -> list[CocoEntry]:
    faults: list[str] = []

    def leave_out(reason: str, subject: str) -> None:
        faults.append(f"{subject}: {reason}")
        note(reason, f"{printable(path)}: {subject}")

    entries, broken = _entries(content["images"], leave_out)
    _attach(content["annotations"], entries, broken, crowds, leave_out)
    used = [entry for entry in entries.values() if entry.annotations]
    skipped = sum(len(entry.crowds) for entry in entries.values())
    crowd_text = f"{skipped} annotations marked iscrowd left out; --crowds use takes them as objects"
    if not used:
        causes = ([crowd_text] if skipped else []) + ([f"the first fault, {faults[0]}"] if faults else [])
        raise ValueError(
            "; ".join([f"{printable(path)}: expected annotations of objects, found no picture with a mask", *causes])
        )
    if skipped:
        note(crowd_text, path)
    if idle := sum(not entry.annotations and not entry.crowds for entry in entries.values()):
        note(f"{idle} pictures without an annotation left out", path)
    return used


def _entries(images: list[Any], leave_out: Callable[[str, str], None]) -> tuple[dict[Any, CocoEntry], set[Any]]:
    """The sound image entries, by id, and the ids of the others."""
    first: dict[Any, Any] = {}
    ambiguous = set()
    for image in images:
        if _image_fault(image) is None and _identity(first.setdefault(image["id"], image)) != _identity(image):
            ambiguous.add(image["id"])
    entries: dict[Any, CocoEntry] = {}
    broken = set()
    for place, image in enumerate(images):
        fault = _image_fault(image)
        if fault is None and image["id"] in ambiguous:
            fault = "expected each id once, got one that several pictures have"
        elif fault is None and image["id"] in entries:
            fault = "expected each picture once, got an entry again"
        if fault is None:
            height, width = int(image["height"]), int(image["width"])
            entries[image["id"]] = CocoEntry(image["id"], image["file_name"], height, width)
            continue
        leave_out(f"picture left out: {fault}", _picture_label(image, place))
        if isinstance(image, dict) and _is_id(image.get("id")):
            broken.add(image["id"])
    return entries, broken


def _image_fault(image: Any) -> str | None:
    if not isinstance(image, dict):
        return "expected an entry with id, file_name, height and width, got something else"
    if not _is_id(image.get("id")):
        return "expected an id that is a number or text, got another or none"
    name = image.get("file_name")
    if not isinstance(name, str) or PurePosixPath(name.replace("\\", "/")).name in ("", ".."):
        return "expected a file_name, got another or none"
    long = any(len(part.encode("utf-8", "replace")) > 255 for part in PurePosixPath(name).parts) or len(name) > 4000
    if long or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        return "expected a file_name, got one that no file can have"
    if "://" in name:
        return "expected a file_name, got an address"
    for side in ("height", "width"):
        value: Any = image.get(side)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or value <= 0:
            return f"expected a {side} in whole pixels, got another or none"
    if image["height"] * image["width"] > MAX_PIXELS:
        return f"expected at most {MAX_PIXELS:,} pixels, got more"
    return None


def _identity(image: Any) -> tuple[Any, ...]:
    """What of a sound entry says which picture it is."""
    return posixpath.normpath(image["file_name"]), image["height"], image["width"]


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str | float) and not isinstance(value, bool) and value == value


def _picture_label(image: Any, place: int) -> str:
    name = image.get("file_name") if isinstance(image, dict) else None
    return f"picture {_text(name)}" if isinstance(name, str) and name else f"images[{place}]"


def _text(value: str) -> str:
    """A name or an id from the file, for a note."""
    return printable(value[:200].encode("utf-8", "backslashreplace").decode())


def annotation_label(annotation: Any, place: int) -> str:
    """``annotation ID``, or its place where it has no usable id."""
    number = annotation.get("id") if isinstance(annotation, dict) else None
    if not _is_id(number):
        return f"annotations[{place}]"
    return f"annotation {_text(str(number))}"


def _attach(
    annotations: list[Any],
    entries: dict[Any, CocoEntry],
    broken: set[Any],
    crowds: str,
    leave_out: Callable[[str, str], None],
) -> None:
    """Give every sound annotation to its picture; those of pictures that are ``broken`` go with them."""
    seen: dict[Any, Annotation] = {}
    for place, annotation in enumerate(annotations):
        number = annotation.get("id") if isinstance(annotation, dict) else None
        again = seen.setdefault(number, annotation) is not annotation if _is_id(number) else False
        owner = annotation.get("image_id") if isinstance(annotation, dict) else None
        entry = entries.get(owner) if _is_id(owner) else None
        fault = _annotation_fault(annotation, entry, seen[number] if again else None)
        if fault is None and entry is not None:
            crowd = annotation.get("iscrowd") and crowds == "skip"
            (entry.crowds if crowd else entry.annotations).append(annotation)
        elif entry is not None or not (_is_id(owner) and owner in broken):
            label = annotation_label(annotation, place) + (f" (annotations[{place}])" if again else "")
            label = label if entry is None else f"picture {printable(entry.file_name)}: {label}"
            leave_out(f"annotation left out: {fault}", label)


def _annotation_fault(annotation: Any, entry: CocoEntry | None, namesake: Annotation | None) -> str | None:
    """What is wrong with an annotation; ``namesake`` is an earlier one of its id."""
    if not isinstance(annotation, dict):
        return "expected a dictionary, got something else"
    if entry is None:
        return "expected the image_id of a listed picture, got another"
    crowd = annotation.get("iscrowd")
    if crowd is not None and not (isinstance(crowd, int | float) and crowd in (0, 1)):
        return "expected iscrowd 0 or 1, got another"
    if namesake == annotation:
        return "expected each annotation once, got one again"
    return None


def picture_folder(path: Path, file_names: list[str]) -> Path:
    """The folder that the file names of a COCO file start from: beside the file, or where COCO itself has them.

    Raises:
        ValueError: none of the pictures is found.
    """
    part = part_of(path)
    folders: list[Path] = []
    for file in (path, path.resolve()):  # a link to the file may lie elsewhere than its pictures
        beside, above = file.parent, file.parent.parent
        images, images_above = (_named_images(folder) for folder in (beside, above))
        folders += [beside, images, above / part, images_above / part, images_above, above]
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        # Not only the first one: a picture may be missing, which is that picture's own trouble.
        if any(os.path.isfile(picture_path(folder, name)) for name in file_names):
            return folder
    looked = ", ".join(printable(folder) for folder in folders)
    raise ValueError(
        f"{printable(path)}: expected its pictures ({printable(file_names[0])}, ...) in one of {looked}, found none"
    )


def part_of(path: Path) -> str:
    """``val`` of instances_val.json, in upper or lower case; else the file's stem."""
    start = len("instances_")
    return path.stem[start:] if path.stem[:start].lower() == "instances_" else path.stem


def _named_images(folder: Path) -> Path:
    """The folder images/ in this one; else the one whose name differs in upper and lower case only."""
    if os.path.isdir(folder / "images"):
        return folder / "images"
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower() == "images")
    except (OSError, ValueError):
        names = []
    return folder / (names[0] if names else "images")


def picture_path(folder: Path, file_name: str) -> Path:
    """The picture's file; backslashes separate folders where no file has them in its name."""
    path = folder / file_name
    if "\\" in file_name and not os.path.isfile(path):
        return folder / file_name.replace("\\", "/")
    return path


def picture_name(file_name: str) -> str:
    """A picture's name without its suffix and without the steps out of the folder, as the last part of a sample's."""
    parts = PurePosixPath(file_name.replace("\\", "/")).with_suffix("").parts
    return "/".join(part for part in parts if part not in ("/", "//", ".."))
