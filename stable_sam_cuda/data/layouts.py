"""The ways in which pictures with masks lie on disk, and how each is found.

``folders``: two folders side by side, as `FOLDERS` names them, a mask having its picture's stem and lying as deep: a
plain images/ and masks/, and DIS5K, COIFT, HRSOD and ThinObject5K as HQ-SAM's users have them. ``mixed``: STEM.jpg and
STEM.png in one folder, as DUTS, ECSSD, FSS-1000 and MSRA10K have them. ``coco``: a COCO file near its pictures.

A pair of folders inside a paired folder is a set of its own. A COCO file there is left out if there are masks.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from stable_sam_cuda.data.coco_files import CROWDS, part_of
from stable_sam_cuda.data.coco_images import CocoImage, NotCocoError, find_coco_images
from stable_sam_cuda.data.masks import MEANINGS, MaskSet
from stable_sam_cuda.data.samples import MaskedImage, Sample
from stable_sam_cuda.data.walk import Folder, walk
from stable_sam_cuda.notes import note, printable

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_SUFFIXES = (*JPEG_SUFFIXES, ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".j2k", ".ppm")
# The first that is there is taken.
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".pbm", ".jp2", ".j2k", ".avif",
                 *JPEG_SUFFIXES)  # fmt: skip
# Beside pictures, files of these are about them.
SIDECARS = (".txt", ".json", ".xml", ".csv", ".yaml", ".yml", ".xmp", ".md", ".html", ".cfg", ".ini")

# pictures' folder: (masks' folders, the first that is there is taken; part of the set; masks of one object each)
FOLDERS = {
    "images": (("masks_max255", "masks"), "", False),
    "im": (("gt",), "", True),
    "images_train": (("masks_train",), "train", True),
    "images_test": (("masks_test",), "test", True),
}
COCO_FILES = ("instances_*.json", "*.coco.json", "annotations.json")
COCO_AMONG_MASKS = "COCO files in a pair of folders are left out, since the masks are used; to use one, give it as DATA"
SECOND_MASKS = "folders of masks beside the one that is used are left out"
SECOND_MASK = "masks that differ in the suffix from the one that is used are left out"
SHARED_MASKS = "pictures that differ in the suffix from another one share its mask"
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
        return _once(list(find_coco_images(root, printable(part_of(root)), crowds)))
    if not os.path.isdir(root):
        raise ValueError(f"data: expected a folder or a COCO file, got {printable(root)}")
    try:
        tree = walk(root)
    except OSError as error:
        raise OSError(f"data: expected a folder that can be listed, got {printable(root)}: {error.strerror}") from error
    coco_files = _coco_files(tree)
    left_out = _LeftOut()
    samples: list[MaskedImage | CocoImage] = []
    faults: list[ValueError | OSError] = []
    names = _Names()
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        set_name = _set_name(here.path, root)
        inner = dict(here.folders)
        for pair in pairs_in(here) if layout != "coco" else []:
            listed = _below(pair.images, coco_files) + _below(pair.masks[0], coco_files)
            if layout == "auto" and listed and not any(_files(one, MASK_SUFFIXES) for one in pair.masks[0].below()):
                continue  # an empty folder of masks beside pictures that a COCO file lists
            inner = {name: one for name, one in inner.items() if one is not pair.images and one not in pair.masks}
            if layout in ("auto", "folders"):
                meaning = "binary" if pair.binary and masks == "auto" else masks
                whole_name = "/".join(filter(None, (set_name, pair.part)))
                found, sets = _paired(pair.images, pair.masks[0], whole_name, meaning, names, left_out)
                samples += found
                waiting += sets[::-1]
                apart = {file for one in sets for file in _below(one, coco_files)}
                for file in sorted(set(listed) - apart) if layout == "auto" else []:
                    left_out.add(COCO_AMONG_MASKS, file)
                for folder in pair.masks[1:]:
                    left_out.add(SECOND_MASKS, folder.path)
        if layout in ("auto", "mixed"):
            samples += _mixed(here, set_name, "binary" if masks == "auto" else masks, names, left_out)
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
    left_out.tell()
    for fault in faults:
        note("COCO file left out", str(fault))
    return _once(samples)


class Pair(NamedTuple):
    """Folders of pictures and of their masks; the first of ``masks`` is taken. ``binary``: masks of one object."""

    images: Folder
    masks: list[Folder]
    part: str
    binary: bool


def pairs_in(folder: Folder) -> list[Pair]:
    """The pairs of folders, by `FOLDERS`, that lie side by side in ``folder``."""
    pairs = []
    for picture_name, (mask_names, part, binary) in FOLDERS.items():
        pictures = folder.child(picture_name)
        masks = [one for one in map(folder.child_or_link, mask_names) if one is not None and one is not pictures]
        if pictures is not None and masks:
            pairs.append(Pair(pictures, masks, part, binary))
    return pairs


class _LeftOut:
    """What is left out or shared, by reason; told at the end, each reason once with the number."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}

    def add(self, reason: str, path: Path) -> None:
        self._paths.setdefault(reason, []).append(path)

    def tell(self) -> None:
        for reason, paths in self._paths.items():
            note(f"{reason}: {len(paths)}, the first is this one", min(paths))


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
        if any(fnmatchcase(name.lower(), pattern) for pattern in COCO_FILES)
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
    in_annotations = file.parent.name.lower() == "annotations" and file.parent != root
    home = file.parent.parent if in_annotations else file.parent
    if (part := part_of(file)) != file.stem:
        relative = home.relative_to(root).as_posix()
        return part if relative == "." else f"{relative}/{part}"
    return _set_name(home, root)


def _paired(
    images: Folder, masks: Folder, set_name: str, meaning: str, names: _Names, left_out: _LeftOut
) -> tuple[list[MaskedImage], list[Folder]]:
    """Pictures and masks of two trees: of folders that lie as deep, by stem.

    Folders in them that hold a pair of their own are not paired, but returned: each is a set apart.
    """
    mask_set = MaskSet([file for folder in masks.below() for file in _candidates(folder)], meaning)
    samples: list[MaskedImage] = []
    sets: list[Folder] = []
    waiting: list[tuple[Folder, Folder, str]] = [(images, masks, set_name)]
    while waiting:
        here, there, name = waiting.pop()
        samples += _pairs(here, there, IMAGE_SUFFIXES, MASK_SUFFIXES, name, mask_set, names, left_out)
        here, there = (_without_pairs(one, other, sets) for one, other in ((here, there), (there, here)))
        inner = [
            (one, there.child_or_link(part) or Folder(there.path / part), part) for part, one in here.folders.items()
        ]
        paired = [one for _, one, _ in inner]
        inner += [(Folder(here.path / part), one, part) for part, one in there.folders.items() if one not in paired]
        waiting += [(one, other, f"{name}/{part}") for one, other, part in sorted(inner, key=lambda pair: pair[2])][
            ::-1
        ]
    return samples, sets


def _without_pairs(folder: Folder, opposite: Folder, sets: list[Folder]) -> Folder:
    """``folder`` without the folders of pairs in it, which go to ``sets``, unless ``opposite`` has the same ones."""
    pairs = [one for one in pairs_in(folder) if not _has(opposite, one)]
    apart = [one for pair in pairs for one in (pair.images, *pair.masks)]
    if not apart:
        return folder
    taken = {name: one for name, one in folder.folders.items() if one in apart}
    sets.append(Folder(folder.path, [], taken, folder.again))
    rest = {name: one for name, one in folder.folders.items() if name not in taken}
    return Folder(folder.path, folder.files, rest, folder.again)


def _has(folder: Folder, pair: Pair) -> bool:
    """Whether ``folder`` has folders of the same names: the pair's are then names of classes or parts."""
    return all(folder.child_or_link(one.path.name) for one in (pair.images, pair.masks[0]))


def _mixed(folder: Folder, set_name: str, meaning: str, names: _Names, left_out: _LeftOut) -> list[MaskedImage]:
    """Pictures STEM.jpg and masks STEM.png of one folder; nothing where no picture has its mask."""
    masks = _files(folder, (".png",))
    if not {one.stem for one in _files(folder, JPEG_SUFFIXES)} & {one.stem for one in masks}:
        return []
    mask_set = MaskSet(masks, meaning)
    return _pairs(folder, folder, JPEG_SUFFIXES, (".png",), set_name, mask_set, names, left_out)


def _pairs(
    images: Folder,
    masks: Folder,
    image_suffixes: tuple[str, ...],
    mask_suffixes: tuple[str, ...],
    set_name: str,
    mask_set: MaskSet,
    names: _Names,
    left_out: _LeftOut,
) -> list[MaskedImage]:
    samples: list[MaskedImage] = []
    by_stem: dict[str, list[Path]] = {}
    for mask in sorted(_files(masks, mask_suffixes), key=lambda one: mask_suffixes.index(one.suffix.lower())):
        by_stem.setdefault(mask.stem, []).append(mask)
    # Where no suffix fits, a file of another one stands for its stem: reading it tells what is wrong, or even succeeds.
    apart = images is not masks
    other_images, other_masks = ({one.stem: one for one in _candidates(folder) if apart} for folder in (images, masks))
    seen: set[str] = set()
    for picture in _files(images, image_suffixes):
        found = by_stem.get(picture.stem) or [
            other_masks.get(picture.stem, masks.path / f"{picture.stem}{mask_suffixes[0]}")
        ]
        # Two pictures of one stem share its mask; the second goes by its whole file name.
        name = picture.name if picture.stem in seen else picture.stem
        if picture.stem in seen:
            left_out.add(SHARED_MASKS, picture)
        elif len(found) > 1:
            left_out.add(SECOND_MASK, found[1])
        seen.add(picture.stem)
        samples.append(MaskedImage(names(f"{set_name}/{name}"), picture, found[0], mask_set))
    for stem in by_stem.keys() - seen:
        picture = other_images.get(stem, images.path / f"{stem}{image_suffixes[0]}")
        samples.append(MaskedImage(names(f"{set_name}/{stem}"), picture, by_stem[stem][0], mask_set))
    return sorted(samples, key=lambda sample: sample.name)


def _candidates(folder: Folder) -> list[Path]:
    """The files that may be pictures, whatever their suffix."""
    return [folder.path / name for name in folder.files if Path(name).suffix.lower() not in SIDECARS]


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


def _below(folder: Folder, files: set[Path]) -> list[Path]:
    """Those of the files that lie in ``folder`` or below it."""
    return [path for one in folder.below() for name in one.files if (path := one.path / name) in files]
