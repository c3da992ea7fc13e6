"""The ways in which pictures with masks lie on disk, and how each is found.

``folders``: two folders side by side, as `FOLDERS` names them, a mask having its picture's stem: a plain images/ and
masks/, and DIS5K, COIFT, HRSOD and ThinObject5K as HQ-SAM's users have them. ``mixed``: STEM.jpg and STEM.png in one
folder, as DUTS, ECSSD, FSS-1000 and MSRA10K have them. ``coco``: a COCO file near its pictures.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from stable_sam_cuda.training.samples import MaskedImage, Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")  # the first that is there is taken

# pictures' folder: (masks' folders, the first that is there is taken; part of the set; masks of one object each)
FOLDERS = {
    "images": (("masks_max255", "masks"), "", False),
    "im": (("gt",), "", True),
    "images_train": (("masks_train",), "train", True),
    "images_test": (("masks_test",), "test", True),
}
COCO_FILES = ("instances_*.json", "*.coco.json", "annotations.json")
LAYOUTS = ("auto", "folders", "mixed", "coco")


def find_samples(root: Path, layout: str = "auto") -> list[Sample]:
    """Every picture below ``root`` in one of the layouts, or in any of them, in the order of the paths.

    A picture without a mask and a mask without a picture are samples, too, where others have both: loading them
    tells what is missing. ``root`` may be a COCO file.

    Raises:
        ValueError: the layout is unknown, or ``root`` is no folder and no COCO file.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if root.is_file() and layout in ("auto", "coco"):
        return _coco(root, root.stem.removeprefix("instances_"))
    if not root.is_dir():
        raise ValueError(f"data: expected a folder or a COCO file, got {root}")
    samples: list[Sample] = []
    for path, folders, files in os.walk(root, followlinks=True):
        here = Path(path)
        for picture_name, (mask_names, part, binary) in FOLDERS.items():
            mask_name = next((name for name in mask_names if name in folders), None)
            if picture_name in folders and mask_name is not None:
                folders[:] = [name for name in folders if name != picture_name and name not in mask_names]
                if layout in ("auto", "folders"):
                    set_name = "/".join(filter(None, (_set_name(here, root), part)))
                    samples += _paired(here / picture_name, here / mask_name, set_name, binary)
        if layout in ("auto", "mixed"):
            samples += _mixed(here, files, _set_name(here, root))
        if layout in ("auto", "coco"):
            for file in sorted({file for pattern in COCO_FILES for file in here.glob(pattern)}):
                samples += _coco(file, _coco_set_name(file, root), other_json=layout == "auto")
        folders.sort()
    return samples


def _set_name(folder: Path, root: Path) -> str:
    relative = folder.relative_to(root).as_posix()
    return root.resolve().name if relative == "." else relative


def _coco_set_name(file: Path, root: Path) -> str:
    """``val2017`` of annotations/instances_val2017.json, below its data set's folder; else the file's own folder."""
    home = file.parent.parent if file.parent.name == "annotations" and file.parent != root else file.parent
    if file.name.startswith("instances_"):
        relative = home.relative_to(root).as_posix()
        part = file.stem.removeprefix("instances_")
        return part if relative == "." else f"{relative}/{part}"
    return _set_name(home, root)


def _coco(file: Path, set_name: str, other_json: bool = False) -> list[Sample]:
    """The pictures of a COCO file; with ``other_json``, none of a file that only has such a file's name."""
    # Imported here, so that data in folders can be used without the library that reads COCO's masks.
    from stable_sam_cuda.training.coco_images import NotCocoError, find_coco_images

    try:
        return list(find_coco_images(file, set_name))
    except NotCocoError:
        if other_json:
            return []
        raise


def _paired(images: Path, masks: Path, set_name: str, binary: bool) -> list[Sample]:
    """Pictures and masks of two folders, by stem."""
    pictures = list(_files(images.iterdir(), IMAGE_SUFFIXES))
    by_stem: dict[str, list[Path]] = {}
    for mask in _files(masks.iterdir(), MASK_SUFFIXES):
        by_stem.setdefault(mask.stem, []).append(mask)
    return _pairs(pictures, by_stem, images, masks, set_name, binary)


def _mixed(folder: Path, files: list[str], set_name: str) -> list[Sample]:
    """Pictures STEM.jpg and masks STEM.png of one folder; nothing where no picture has its mask."""
    paths = [folder / file for file in files]
    pictures = list(_files(paths, (".jpg", ".jpeg")))
    by_stem = {mask.stem: [mask] for mask in _files(paths, (".png",))}
    if not any(picture.stem in by_stem for picture in pictures):
        return []
    return _pairs(pictures, by_stem, folder, folder, set_name, binary=True)


def _pairs(
    pictures: list[Path], by_stem: dict[str, list[Path]], images: Path, masks: Path, set_name: str, binary: bool
) -> list[Sample]:
    samples: list[Sample] = []
    stems = {picture.stem for picture in pictures}
    seen: set[str] = set()
    for picture in pictures:
        mask = min(by_stem.get(picture.stem, []), key=_preference, default=masks / f"{picture.stem}.png")
        # Two pictures of one stem share its mask; the second goes by its whole file name.
        name = picture.name if picture.stem in seen else picture.stem
        seen.add(picture.stem)
        samples.append(MaskedImage(f"{set_name}/{name}", picture, mask, binary))
    for stem in by_stem.keys() - stems:
        samples.append(MaskedImage(f"{set_name}/{stem}", images / f"{stem}.jpg", by_stem[stem][0], binary))
    return sorted(samples, key=lambda sample: sample.name)


def _files(paths: Iterable[Path], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The visible files of these suffixes, in the order of their names."""
    for path in sorted(paths):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            yield path


def _preference(mask: Path) -> int:
    return MASK_SUFFIXES.index(mask.suffix.lower())
