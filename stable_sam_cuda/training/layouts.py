"""The ways in which pictures with masks lie on disk, and how each is found.

``folders``: two folders side by side, as `FOLDERS` names them, a mask having its picture's stem and lying as deep: a
plain images/ and masks/, and DIS5K, COIFT, HRSOD and ThinObject5K as HQ-SAM's users have them. ``mixed``: STEM.jpg and
STEM.png in one folder, as DUTS, ECSSD, FSS-1000 and MSRA10K have them. ``coco``: a COCO file near its pictures.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from stable_sam_cuda.notes import note, printable
from stable_sam_cuda.training.coco_files import CROWDS
from stable_sam_cuda.training.coco_images import CocoImage, NotCocoError, find_coco_images
from stable_sam_cuda.training.mask_files import MEANINGS, MaskSet
from stable_sam_cuda.training.samples import MaskedImage, Sample
from stable_sam_cuda.training.walk import Folder, walk

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


def find_samples(root: Path, layout: str = "auto", *, masks: str = "auto", crowds: str = "skip") -> list[Sample]:
    """Every picture below ``root`` in one of the layouts, or in any of them, in the order of the paths.

    A picture without a mask and a mask without a picture are samples, too, where others have both: loading them
    tells what is missing. Links are followed, but each real folder and each real picture is used once. ``root`` may
    be a COCO file. A COCO file that cannot be used is noted, unless nothing else is found.

    Args:
        masks: what mask files mean, as `MaskSet` has it; ``auto``: as the layout and the files say.
        crowds: what is done with COCO's crowds, as `find_coco_images` has it.

    Raises:
        ValueError: the layout is unknown, or ``root`` is no folder and no COCO file, or a broken COCO file is all
            that there is.
        OSError: ``root`` cannot be read.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if masks not in MEANINGS:
        raise ValueError(f"masks: expected one of {', '.join(MEANINGS)}, got {masks!r}")
    if crowds not in CROWDS:
        raise ValueError(f"crowds: expected one of {', '.join(CROWDS)}, got {crowds!r}")
    if os.path.isfile(root) and layout in ("auto", "coco"):
        return _once(list(find_coco_images(root, printable(root.stem.removeprefix("instances_")), crowds)))
    if not os.path.isdir(root):
        raise ValueError(f"data: expected a folder or a COCO file, got {printable(root)}")
    try:
        tree = walk(root)
    except OSError as error:
        raise OSError(f"data: expected a folder that can be listed, got {printable(root)}: {error.strerror}") from error
    coco_files = _coco_files(tree)
    samples: list[MaskedImage | CocoImage] = []
    faults: list[ValueError | OSError] = []
    names = _Names()
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        set_name = _set_name(here.path, root)
        inner = dict(here.folders)
        for picture_name, (mask_names, part, binary) in FOLDERS.items():
            pictures = here.child(picture_name)
            found = [one for one in map(here.child_or_link, mask_names) if one is not None and one is not pictures]
            if pictures is not None and found:
                inner = {name: one for name, one in inner.items() if one is not pictures and one not in found}
                if layout in ("auto", "folders"):
                    meaning = "binary" if binary and masks == "auto" else masks
                    whole_name = "/".join(filter(None, (set_name, part)))
                    samples += _paired(pictures, found[0], whole_name, meaning, names)
        if layout in ("auto", "mixed"):
            samples += _mixed(here, set_name, "binary" if masks == "auto" else masks, names)
        if layout in ("auto", "coco"):
            for file in sorted(coco_files & {here.path / name for name in here.files}):
                try:
                    samples += find_coco_images(file, printable(_coco_set_name(file, root)), crowds)
                except NotCocoError as error:
                    # In a tree, other JSON may have such a name.
                    if layout == "auto":
                        note("JSON file with the name of a COCO file left out", str(error))
                    else:
                        faults.append(error)
                except (ValueError, OSError) as error:
                    faults.append(error)
        waiting += [inner[name] for name in sorted(inner, reverse=True)]
    if faults and not samples:
        raise faults[0]
    for fault in faults:
        note("COCO file left out", str(fault))
    return _once(samples)


class _Names:
    """Names of samples as printable text, different ones for different files."""

    def __init__(self) -> None:
        self._raw: dict[str, str] = {}

    def __call__(self, raw: str) -> str:
        name, number = printable(raw), 1
        while self._raw.setdefault(name, raw) != raw:
            number += 1
            name = f"{printable(raw)}~{number}"
        return name


def _set_name(folder: Path, root: Path) -> str:
    relative = folder.relative_to(root).as_posix()
    return (root.resolve().name or "data") if relative == "." else relative


def _coco_files(tree: Folder) -> set[Path]:
    """Every file with the name of a COCO file, each real one once."""
    files = [
        folder.path / name
        for folder in tree.below()
        for name in folder.files
        if any(fnmatchcase(name, pattern) for pattern in COCO_FILES)
    ]
    real: dict[tuple[int, int], Path] = {}
    for file in sorted(files, key=_plainness):
        found = os.stat(file)
        real.setdefault((found.st_dev, found.st_ino), file)
    if len(real) < len(files):
        again = min(set(files) - set(real.values()))
        note(f"links to COCO files that are used under another name are left out: {len(files) - len(real)}", again)
    return set(real.values())


def _coco_set_name(file: Path, root: Path) -> str:
    """``val2017`` of annotations/instances_val2017.json, below its data set's folder; else the file's own folder."""
    home = file.parent.parent if file.parent.name == "annotations" and file.parent != root else file.parent
    if file.name.startswith("instances_"):
        relative = home.relative_to(root).as_posix()
        part = file.stem.removeprefix("instances_")
        return part if relative == "." else f"{relative}/{part}"
    return _set_name(home, root)


def _paired(images: Folder, masks: Folder, set_name: str, meaning: str, names: _Names) -> list[MaskedImage]:
    """Pictures and masks of two trees: of folders that lie as deep, by stem."""
    mask_set = MaskSet([file for folder in masks.below() for file in _files(folder, MASK_SUFFIXES)], meaning)
    samples: list[MaskedImage] = []
    waiting: list[tuple[Folder, Folder, str]] = [(images, masks, set_name)]
    while waiting:
        here, there, name = waiting.pop()
        by_stem: dict[str, list[Path]] = {}
        for mask in _files(there, MASK_SUFFIXES):
            by_stem.setdefault(mask.stem, []).append(mask)
        samples += _pairs(_files(here, IMAGE_SUFFIXES), by_stem, here.path, there.path, name, mask_set, names)
        inner = [
            (one, there.child_or_link(part) or Folder(there.path / part), part) for part, one in here.folders.items()
        ]
        paired = [one for _, one, _ in inner]
        inner += [(Folder(here.path / part), one, part) for part, one in there.folders.items() if one not in paired]
        waiting += [(one, other, f"{name}/{part}") for one, other, part in sorted(inner, key=lambda pair: pair[2])][
            ::-1
        ]
    return samples


def _mixed(folder: Folder, set_name: str, meaning: str, names: _Names) -> list[MaskedImage]:
    """Pictures STEM.jpg and masks STEM.png of one folder; nothing where no picture has its mask."""
    pictures = _files(folder, (".jpg", ".jpeg"))
    by_stem = {mask.stem: [mask] for mask in _files(folder, (".png",))}
    if not any(picture.stem in by_stem for picture in pictures):
        return []
    mask_set = MaskSet([mask for found in by_stem.values() for mask in found], meaning)
    return _pairs(pictures, by_stem, folder.path, folder.path, set_name, mask_set, names)


def _pairs(
    pictures: list[Path],
    by_stem: dict[str, list[Path]],
    images: Path,
    masks: Path,
    set_name: str,
    mask_set: MaskSet,
    names: _Names,
) -> list[MaskedImage]:
    samples: list[MaskedImage] = []
    stems = {picture.stem for picture in pictures}
    seen: set[str] = set()
    for picture in pictures:
        mask = min(by_stem.get(picture.stem, []), key=_preference, default=masks / f"{picture.stem}.png")
        # Two pictures of one stem share its mask; the second goes by its whole file name.
        name = picture.name if picture.stem in seen else picture.stem
        seen.add(picture.stem)
        samples.append(MaskedImage(names(f"{set_name}/{name}"), picture, mask, mask_set))
    for stem in by_stem.keys() - stems:
        samples.append(MaskedImage(names(f"{set_name}/{stem}"), images / f"{stem}.jpg", by_stem[stem][0], mask_set))
    return sorted(samples, key=lambda sample: sample.name)


def _once(samples: Iterable[MaskedImage | CocoImage]) -> list[Sample]:
    """The samples without those whose picture is another's real file, be it by links or by two sources."""
    real: dict[tuple[int, int], MaskedImage | CocoImage] = {}
    kept: list[MaskedImage | CocoImage] = []
    again: list[MaskedImage | CocoImage] = []
    by_file: dict[int, tuple[int, int]] = {}
    samples = list(samples)
    for sample in sorted(samples, key=lambda one: _plainness(one.image)):
        try:
            found = os.stat(sample.image)
        except (OSError, ValueError):
            continue
        by_file[id(sample)] = identity = (found.st_dev, found.st_ino)
        real.setdefault(identity, sample)
    for sample in samples:
        first = real.get(by_file[id(sample)], sample) if id(sample) in by_file else sample
        # Two sources that give one name to one picture contradict each other, which is told elsewhere.
        (kept if first is sample or first.name == sample.name else again).append(sample)
    if again:
        reason = f"pictures that are used under another name, by a link or a second source, are left out: {len(again)}"
        note(reason, f"the first, {again[0].name}")
    return list(kept)


def _plainness(path: Path) -> tuple[bool, int]:
    return path.is_symlink(), len(path.parts)


def _files(folder: Folder, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of these suffixes, in the order of their names."""
    return [folder.path / name for name in folder.files if Path(name).suffix.lower() in suffixes]


def _preference(mask: Path) -> int:
    return MASK_SUFFIXES.index(mask.suffix.lower())
