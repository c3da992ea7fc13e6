"""Pictures with objects from a COCO file: polygons and run lengths, by faster-coco-eval's mask routines."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stable_sam_cuda.picture import read_picture
from stable_sam_cuda.training.samples import set_of

try:
    from faster_coco_eval.core import mask as mask_tools
except ImportError as error:
    raise ImportError("COCO files need faster-coco-eval: pip install 'stable_sam_cuda[train]'") from error

Annotation = dict[str, Any]


class NotCocoError(ValueError):
    """A JSON file that holds something else."""


@dataclass(frozen=True)
class CocoImage:
    """One picture of a COCO file; ``annotations`` are those of its objects, ``crowds`` those of groups of them."""

    name: str
    image: Path
    height: int
    width: int
    annotations: tuple[Annotation, ...]
    crowds: tuple[Annotation, ...] = ()

    @property
    def set_name(self) -> str:
        return set_of(self.name)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) RGB uint8 and object ids (H, W) uint8 or uint16: 1 + the annotation's place.

        Where objects overlap, the smaller one is seen: in COCO it is mostly in front, and it would vanish behind.

        Raises:
            ValueError, OSError: the picture cannot be read or has not the size the file says; an annotation has no
                segmentation, or a broken one.
        """
        image = np.asarray(read_picture(self.image))
        if image.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"{self.name}: picture has size {image.shape[:2]}, its COCO entry {(self.height, self.width)}"
            )
        masks = [self.mask(place) for place in range(len(self.annotations))]
        ids = np.zeros((self.height, self.width), np.uint8 if len(masks) <= np.iinfo(np.uint8).max else np.uint16)
        for place in sorted(range(len(masks)), key=lambda place: -int(masks[place].sum())):
            ids[masks[place]] = place + 1
        return image, ids

    def mask(self, place: int) -> np.ndarray:
        """The whole mask (H, W) bool of one object.

        Raises:
            ValueError: the annotation has no segmentation, or a broken one.
        """
        annotation = self.annotations[place]
        try:
            return decode_segmentation(annotation.get("segmentation"), self.height, self.width)
        except ValueError as error:
            raise ValueError(f"{self.name}: annotation {annotation.get('id', place)}: {error}") from error


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Mask (H, W) bool of a COCO segmentation: polygons, or run lengths, compressed or not.

    Raises:
        ValueError: there is none, a polygon has fewer than three corners, or the run lengths are of another size.
    """
    if not segmentation:
        raise ValueError("expected a segmentation, got none")
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"segmentation: expected run lengths of size {[height, width]}, got {segmentation}")
        counts = segmentation["counts"]
        runs = mask_tools.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
        return mask_tools.decode(runs).astype(bool)
    lengths = [len(polygon) for polygon in segmentation]
    if min(lengths) < 6 or any(length % 2 for length in lengths):
        raise ValueError(f"segmentation: expected polygons of three or more x, y pairs, got lengths {lengths}")
    return mask_tools.decode(mask_tools.merge(mask_tools.frPyObjects(segmentation, height, width))).astype(bool)


def read_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO file.

    Raises:
        ValueError: it is not JSON.
        NotCocoError: it is JSON, but not COCO's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a COCO file, got no JSON: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise NotCocoError(f"{path}: expected a COCO file with images and annotations, got other JSON")
    return content


def find_coco_images(path: Path, set_name: str) -> list[CocoImage]:
    """Every picture of the COCO file ``path`` that has an object, in the order of the file.

    Raises:
        ValueError: the file is not a COCO file, or its pictures are nowhere near it.
    """
    content = read_coco(path)
    try:
        return _images_with_objects(content, path, set_name)
    except KeyError as error:
        raise ValueError(f"{path}: expected every image and annotation to have {error}, got one without") from error


def _images_with_objects(content: dict[str, Any], path: Path, set_name: str) -> list[CocoImage]:
    objects: dict[Any, list[Annotation]] = defaultdict(list)
    crowds: dict[Any, list[Annotation]] = defaultdict(list)
    for annotation in content["annotations"]:
        (crowds if annotation.get("iscrowd") else objects)[annotation["image_id"]].append(annotation)
    entries = [entry for entry in content["images"] if objects[entry["id"]]]
    folder = picture_folder(path, [entry["file_name"] for entry in entries])
    return [
        CocoImage(
            f"{set_name}/{Path(entry['file_name']).with_suffix('').as_posix()}",
            folder / entry["file_name"],
            entry["height"],
            entry["width"],
            tuple(objects[entry["id"]]),
            tuple(crowds[entry["id"]]),
        )
        for entry in entries
    ]


def picture_folder(path: Path, file_names: list[str]) -> Path:
    """The folder that the file names of a COCO file start from: beside the file, or where COCO itself has them.

    Raises:
        ValueError: none of the first pictures is found.
    """
    beside, above = path.parent, path.parent.parent
    part = path.stem.removeprefix("instances_")
    folders = [beside, beside / "images", above / part, above / "images" / part, above / "images", above]
    for folder in folders:
        # Not only the first one: a picture may be missing, which is that picture's own trouble.
        if any((folder / name).is_file() for name in file_names[:20]) or not file_names:
            return folder
    looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise ValueError(f"{path}: expected its pictures ({file_names[0]}, ...) in one of {looked}, found none")
