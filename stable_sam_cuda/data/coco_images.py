"""Pictures with objects from a COCO file."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stable_sam_cuda.data import picture
from stable_sam_cuda.data.coco_files import (
    Annotation,
    CocoEntry,
    NotCocoError,
    annotation_label,
    picture_folder,
    picture_name,
    picture_path,
    read_coco,
    read_entries,
)
from stable_sam_cuda.data.samples import digest_of_file, set_of
from stable_sam_cuda.data.segmentations import (
    SegmentationError,
    area_of,
    borders_around,
    borders_of,
    decode_segmentation,
    filled,
    paint,
    size_of_runs,
)
from stable_sam_cuda.notes import note, printable

__all__ = ["Annotation", "CocoImage", "NotCocoError", "decode_segmentation", "find_coco_images", "read_coco"]

# Part of a picture's digest: raised when the same annotations give other masks than before.
DECODING_RULE = 3

TURNED_RUNS = (
    "an EXIF tag turns the picture; run lengths have the size of the picture before or after the turn, unlike its "
    "entry, and are turned to fit"
)
BACKWARDS = {6: 8, 8: 6}  # EXIF orientations whose turn another one undoes; the others undo themselves


@dataclass(frozen=True)
class CocoImage:
    """One picture of a COCO file; ``annotations`` are those of its objects, ``crowds`` those of groups of them.

    ``height`` and ``width`` are those that the file says: of the picture as it is seen, or as it is stored, where an
    EXIF tag turns it. ``file`` is the COCO file.
    """

    name: str
    image: Path
    height: int
    width: int
    annotations: tuple[Annotation, ...]
    crowds: tuple[Annotation, ...] = ()
    file: Path = Path()
    _said: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def set_name(self) -> str:
        return set_of(self.name)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) RGB uint8 and object ids (H, W) uint8 or uint16: 1 + the annotation's place.

        Where objects overlap, the smaller one is seen: in COCO it is mostly in front, and it would vanish behind.
        Annotations that cannot be decoded, and objects that no pixel is seen of, are noted, once, and left out.

        Raises:
            ValueError, OSError: the picture cannot be read or has not the size the file says, or none of the
                annotations can be used.
        """
        image = np.asarray(picture.read_picture(self.image))
        turned_by = self.orientation()
        objects = self.objects()
        most = len(self.annotations)
        if most > np.iinfo(np.uint16).max:
            raise ValueError(f"{self.name}: expected at most {np.iinfo(np.uint16).max} annotations, got {most}")
        ids = np.zeros((self.height, self.width), np.uint8 if most <= np.iinfo(np.uint8).max else np.uint16)
        for place, borders in sorted(objects.items(), key=lambda item: -area_of(item[1])):
            paint(ids, borders, place + 1)
        self._note_hidden(objects, ids)
        return image, np.ascontiguousarray(picture.turn(ids, turned_by))

    def orientation(self) -> int:
        """EXIF orientation by which the masks are to be turned, 1 where they are upright as the picture is seen.

        Raises:
            ValueError, OSError: the picture has not the size the file says, or cannot be read.
        """
        stored, tag = picture.stored_size(self.image), picture.orientation(self.image)
        seen = stored[::-1] if tag >= 5 else stored
        entry = (self.width, self.height)
        if entry == seen:
            if tag != 1 and entry == stored:
                self.note_once("an EXIF tag turns the picture; its annotations are taken as those of the turned one")
            return 1
        if entry == stored:
            self.note_once("an EXIF tag turns the picture; its annotations are those of the stored one, and turned")
            return tag
        turned = f"; stored as {stored[::-1]}, turned by EXIF orientation {tag}" if tag != 1 else ""
        raise ValueError(
            f"{self.name}: picture has size {seen[::-1]}, its COCO entry {(self.height, self.width)}{turned}"
        )

    def objects(self) -> dict[int, np.ndarray]:
        """The borders of each object, by its annotation's place; see `segmentations`. In the entry's frame.

        Raises:
            ValueError: none can be decoded; the others' faults are noted, once.
            OSError: the picture is needed to know how run lengths are turned, and cannot be read.
        """
        found: dict[int, np.ndarray] = {}
        faults = []
        for place, annotation in enumerate(self.annotations):
            try:
                found[place] = self._borders(annotation)
            except SegmentationError as error:
                faults.append((place, annotation, error))
        # What makes the whole picture useless is said by whoever skips it.
        for place, annotation, fault in faults if found else faults[1:]:
            self.note_once(f"annotation left out: {fault.reason}", annotation_label(annotation, place), fault.got)
        if not found and faults:
            place, annotation, fault = faults[0]
            label = annotation_label(annotation, place)
            raise ValueError(f"{self.name}: {printable(self.file)}: {label}: {fault}") from fault
        return found

    def decoded_crowds(self) -> Iterator[tuple[Annotation, np.ndarray]]:
        """The crowds that can be decoded, and their borders; the others' faults are noted, once."""
        for place, crowd in enumerate(self.crowds):
            try:
                yield crowd, self._borders(crowd)
            except SegmentationError as error:
                self.note_once(f"crowd left out: {error.reason}", annotation_label(crowd, place), error.got)

    def mask(self, place: int) -> np.ndarray:
        """The whole mask (H, W) bool of one object, in the entry's frame.

        Raises:
            ValueError: the annotation has no segmentation, or a broken one.
        """
        annotation = self.annotations[place]
        try:
            return filled(self._borders(annotation), self.height, self.width)
        except ValueError as error:
            raise ValueError(f"{self.name}: {annotation_label(annotation, place)}: {error}") from error

    def is_turned(self, annotation: Annotation) -> bool:
        """Whether the annotation's run lengths are of the picture as stored and its entry as seen, or the reverse.

        Raises:
            ValueError, OSError: the picture cannot be read.
        """
        size = size_of_runs(annotation.get("segmentation"))
        swapped = self.height != self.width and size == (self.width, self.height)
        return swapped and picture.orientation(self.image) >= 5

    def _borders(self, annotation: Annotation) -> np.ndarray:
        """An object's borders in the entry's frame.

        Raises:
            SegmentationError: as `borders_of`.
            ValueError, OSError: as `is_turned`.
        """
        if not self.is_turned(annotation):
            return borders_of(annotation.get("segmentation"), self.height, self.width)
        self.note_once(TURNED_RUNS)
        mask = filled(borders_of(annotation.get("segmentation"), self.width, self.height), self.width, self.height)
        tag = picture.orientation(self.image)
        # Upright as the picture is seen, the entry is; else the masks are turned back to the stored picture.
        return borders_around(picture.turn(mask, tag if self.orientation() == 1 else BACKWARDS.get(tag, tag)))

    def picture_digest(self) -> str:
        """SHA-256, in hexadecimal digits, of what decides on the picture that `load` returns.

        Raises:
            OSError: the file cannot be read.
        """
        return digest_of_file(self.image, picture.RULE)

    def digest(self) -> str:
        """The same of picture and objects: the segmentations in their order, and the size they are for.

        Raises:
            OSError: the file cannot be read.
        """
        content = [DECODING_RULE, self.height, self.width, *map(_content, self.annotations)]
        return hashlib.sha256(f"{self.picture_digest()} {content}".encode()).hexdigest()

    def _note_hidden(self, objects: dict[int, np.ndarray], ids: np.ndarray) -> None:
        seen = np.bincount(ids.ravel(), minlength=len(self.annotations) + 1)[1:] > 0
        for place, borders in objects.items():
            if not seen[place]:
                reason = (
                    "object left out: others cover it"
                    if len(borders)
                    else "object left out: no pixel is in its picture"
                )
                self.note_once(reason, annotation_label(self.annotations[place], place))

    def note_once(self, reason: str, place: str = "", got: str = "") -> None:
        """Note what is decided or lost of this picture, or of the annotation at ``place``, unless it has been."""
        subject = ": ".join(filter(None, (printable(self.file), f"picture {self.name}", place)))
        subject += f" (got {got})" if got else ""
        if f"{subject}: {reason}" not in self._said:
            self._said.add(f"{subject}: {reason}")
            note(reason, subject)


def _content(annotation: Annotation) -> str:
    """What of an annotation decides on its mask, as text."""
    try:
        return json.dumps([annotation.get("segmentation"), annotation.get("iscrowd")], sort_keys=True, default=repr)
    except RecursionError:  # nested so deeply, it is no segmentation, whatever it says
        return ""


def find_coco_images(path: Path, set_name: str, crowds: str = "skip") -> list[CocoImage]:
    """Every picture of the COCO file ``path`` that has an object, in the order of the file.

    Entries of one picture file, as merged files have them, are one picture, which has the objects of all of them.

    Args:
        crowds: ``skip`` leaves annotations marked ``iscrowd`` out, ``use`` takes them as objects.

    Raises:
        ValueError, OSError: as `read_entries`, or the pictures are nowhere near the file.
    """
    entries = read_entries(path, crowds)
    folder = picture_folder(path, [entry.file_name for entry in entries])
    images: dict[str, CocoImage] = {}
    for entry in _joined(entries, folder, path):
        # Two pictures of one stem: the second goes by its whole file name.
        whole = f"{set_name}/{printable(picture_name(entry.file_name + '.x'))}"
        further = (f"{whole}~{number}" for number in itertools.count(2))
        stem = f"{set_name}/{printable(picture_name(entry.file_name))}"
        name = next(one for one in itertools.chain((stem, whole), further) if one not in images)
        image = picture_path(folder, entry.file_name)
        height, width = entry.height, entry.width
        images[name] = CocoImage(name, image, height, width, tuple(entry.annotations), tuple(entry.crowds), path)
    return list(images.values())


def _joined(entries: list[CocoEntry], folder: Path, path: Path) -> list[CocoEntry]:
    """The entries, those of one picture file being one; an annotation that is there twice is taken once."""
    first: dict[tuple[int, int] | str, CocoEntry] = {}
    joined: dict[str, None] = {}
    for entry in entries:
        image = picture_path(folder, entry.file_name)
        try:
            found = os.stat(image)
            same = first.setdefault((found.st_dev, found.st_ino), entry)
        except OSError:
            same = first.setdefault(os.path.normpath(image), entry)
        if same is entry:
            continue
        subject = f"{printable(path)}: picture {printable(entry.file_name)}"
        if (same.height, same.width) != (entry.height, entry.width):
            lost = f"{subject} (objects lost: {len(entry.annotations)})"
            note("picture left out: expected each picture once, got it again with another size", lost)
            continue
        for annotations, more in ((same.annotations, entry.annotations), (same.crowds, entry.crowds)):
            known = {_likeness(one) for one in annotations}
            for one in more:
                if _likeness(one) in known:
                    note(
                        "annotation left out: expected each annotation once, got one again", f"{subject}: {_label(one)}"
                    )
                else:
                    annotations.append(one)
        joined.setdefault(subject)
    for subject in joined:
        note("the picture is listed several times; its objects are joined", subject)
    return list(first.values())


def _likeness(annotation: Annotation) -> str:
    return f"{_content(annotation)} {annotation.get('category_id')!r}"


def _label(annotation: Annotation) -> str:
    return annotation_label(annotation, 0) if "id" in annotation else "an annotation"
