"""What a mask file means: one rule, decided for a set of masks as a whole.

A mask means one of three things:

- ``binary``: one object, where the mask is brighter than half its brightest value. Edges may be soft.
- ``instances``: a value is the id of its object, 0 the background.
- ``void``: as ``instances``, but the largest value of the type (255 in 8 bits, 65535 in 16) is no object: a border of
  undecided pixels, as Pascal VOC has it.

``auto`` finds out which from the files of a set together (up to 256 of them, spread evenly), by
`stable_sam_cuda.training.mask_evidence`, and tells once where it is in doubt. A file that contradicts its set is told
and read as the set is. JPEG and lossy WebP keep no ids, and one bit holds none: such a file is one object in any set.

What the values of a file are:

- Grey of 1 to 32 bits and whole floats: as they are (2 and 4 bits come as multiples of 85 and 17). RGB of equal bands
  is grey; JPEG may differ a little. More colours than that name no object and are refused.
- A palette of greys with black among them: the greys, since it is a compressed grey picture. Any other palette: the
  indices, whatever their colours.
- Transparency: where all that is visible has one colour, opacity is the mask, and one object. Else what is less than
  half as opaque as the most opaque pixel is background, whatever colour hides there. Opacity that is the same
  everywhere says nothing.
- The turn of EXIF is applied, and of several pages or frames the first is read, as for photographs.

Limits of ``auto``: the heuristic cannot know a trimap (0, 128, 255) from two objects, nor a soft mask enlarged by
repeating pixels four times and more from ids; a mask darker than 64 is never soft; tiny objects that all touch each
other in a smooth order of ids look like a slope. In a set of more than 256 files, one that was not looked at may
contradict unseen. Say ``masks`` (``--masks``) for such sets.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stable_sam_cuda.notes import note, printable
from stable_sam_cuda.picture_file import PictureError, Stored, read_stored
from stable_sam_cuda.training.mask_evidence import (
    BINARY,
    INSTANCES,
    VOID,
    Evidence,
    evidence_of,
    is_void,
    verdict_of,
    verdict_of_set,
)

RULE = "mask 2"  # changes whenever the same file would be read differently: caches keep it
MEANINGS = ("auto", BINARY, INSTANCES, VOID)
MAX_FILES = 256
SETTLE = "say --masks binary, instances or void if it is otherwise"
NO_IDS = "a lossy or one-bit mask among masks of ids is read as one object"


class MaskValues(NamedTuple):
    """The values (H, W) of a mask file, whole numbers.

    Args:
        one_object: the file holds one object, in shades, whatever its set means.
        reasons: what was decided or lost, for `note`.
    """

    values: np.ndarray
    one_object: bool
    reasons: list[str]


class MaskSet:
    """Masks that mean the same thing, such as those of one folder.

    Args:
        paths: the masks' files; none is read before the meaning is asked for.
        meaning: one of `MEANINGS`.

    Raises:
        ValueError: the meaning is unknown.
    """

    def __init__(self, paths: Sequence[Path], meaning: str = "auto") -> None:
        if meaning not in MEANINGS:
            raise ValueError(f"masks: expected one of {', '.join(MEANINGS)}, got {meaning!r}")
        self.paths = tuple(paths)
        self._meaning = None if meaning == "auto" else meaning
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[tuple[Path, ...], str]]:
        return MaskSet, (self.paths, self._meaning or "auto")

    @property
    def meaning(self) -> str:
        """``binary``, ``instances`` or ``void``; ``auto`` is decided at the first call. Files that fail do not count.

        Any thread may ask.
        """
        with self._lock:
            if self._meaning is None:
                self._meaning = self._decide()
            return self._meaning

    def read(self, path: Path) -> np.ndarray:
        """Object ids (H, W), uint8 or uint16, 0 being background, of a mask of this set.

        Raises:
            FileNotFoundError, ValueError, OSError: the file cannot be read, or its pixels name no object.
        """
        mask = read_values(path)
        meaning = self.meaning
        for reason in mask.reasons:
            note(reason, path)
        if mask.one_object and meaning != BINARY:
            note(NO_IDS, path)
        return ids_of(path, mask, meaning)

    def _decide(self) -> str:
        count = min(len(self.paths), MAX_FILES)
        chosen = [self.paths[place * len(self.paths) // count] for place in range(count)]
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
            looked = [(path, part) for path, part in zip(chosen, workers.map(_look, chosen), strict=True) if part]
        return decide([path for path, _ in looked], [part for _, part in looked])


def read_ids(path: Path, masks: str = "auto") -> np.ndarray:
    """Object ids (H, W), uint8 or uint16, of a mask file that is a set of its own.

    Args:
        masks: what it means, one of `MEANINGS`.

    Raises:
        FileNotFoundError, ValueError, OSError: as `MaskSet` and `MaskSet.read`.
    """
    return MaskSet([path], masks).read(path)


def decide(paths: Sequence[Path], looks: Sequence["Look"]) -> str:
    """The meaning of masks, told where it is in doubt, and which of them contradict it."""
    parts = [look.evidence for look in looks if not look.one_object]
    verdict = verdict_of_set(parts)
    if verdict is None:
        return BINARY
    folder = os.path.commonpath([path.parent for path in paths]) if len(paths) > 1 else paths[0]
    meaning = verdict.meaning
    if not verdict.sure:
        what = "one object each, with soft edges" if meaning == BINARY else "an id for each object"
        note(f"the masks are in doubt between one object and ids; they are read as {what}: {SETTLE}", folder)
    for path, look in zip(paths, looks, strict=True):
        own = None if look.one_object else verdict_of(look.evidence)
        if own is not None and own.sure and own.meaning != meaning:
            seems, read = ("ids", "one object") if meaning == BINARY else ("one object with soft edges", "ids")
            note(f"the mask seems to hold {seems}, but is read as {read}, like the others: {SETTLE}", path)
    if meaning == BINARY:
        return BINARY
    for void in {look.void for look in looks if look.void}:
        same_type = [look.evidence for look in looks if look.void == void and not look.one_object]
        if is_void(same_type, void):
            note(f"the value {void} beside ids that run from 1 is read as a border without object: {SETTLE}", folder)
            return VOID
    return INSTANCES


class Look(NamedTuple):
    """What a look at one file gives; ``void`` is the largest value of its type, 0 where there is none."""

    evidence: Evidence
    one_object: bool
    void: int


def _look(path: Path) -> Look | None:
    """Evidence of one file; None of one that cannot be read, which is told when it is used."""
    try:
        mask = read_values(path)
    except (ValueError, OSError):
        return None
    return Look(evidence_of(mask.values), mask.one_object, _void_of(mask.values))


def _void_of(values: np.ndarray) -> int:
    return int(np.iinfo(values.dtype).max) if values.dtype in (np.uint8, np.uint16) else 0


def ids_of(path: Path, mask: MaskValues, meaning: str) -> np.ndarray:
    """Object ids (H, W), uint8 or uint16, of a mask's values.

    Raises:
        ValueError: there are more different values than 16 bits hold.
    """
    values = mask.values
    brightest = values.max()
    if mask.one_object or meaning == BINARY:
        return (values > max(brightest, 0) / 2).astype(np.uint8)
    if meaning == VOID and _void_of(values):
        values = np.where(values == _void_of(values), 0, values).astype(values.dtype)
        brightest = values.max()
    if values.min() < 0 or brightest > np.iinfo(np.uint16).max:
        # Hashed ids of 32 bits: numbered in their order, background staying 0.
        used = np.unique(values[values != 0])
        if len(used) > np.iinfo(np.uint16).max:
            raise ValueError(
                f"mask {printable(path)}: expected at most 65535 objects, got {len(used)} different values"
            )
        values, brightest = np.where(values == 0, 0, np.searchsorted(used, values) + 1), len(used)
    return values.astype(np.uint8 if brightest <= np.iinfo(np.uint8).max else np.uint16)


def read_values(path: Path) -> MaskValues:
    """The values of a mask file, by the rule above.

    Raises:
        FileNotFoundError, ValueError, OSError: the file cannot be read, or holds colours or fractions.
    """
    stored = read_stored(path, "mask")
    pixels, opacity = stored.pixels, stored.opacity
    one_bit = isinstance(pixels, Image.Image) and pixels.mode == "1"
    if isinstance(pixels, Image.Image):
        if pixels.mode == "P":
            values = _of_palette(pixels, opacity)
        elif pixels.mode in ("1", "L"):
            values = np.asarray(pixels).astype(np.uint8)
        else:
            values = np.asarray(pixels.convert("RGB"))
    else:
        values = pixels
    one_colour = False
    if opacity is not None and opacity.min() != opacity.max():
        visible = opacity > opacity.max() / 2
        if stored.premultiplied:
            values = _divided(values, opacity, visible)
        if _one_colour(values, opacity, visible):
            values, one_colour = opacity, True
        else:
            values = values * (visible if values.ndim == 2 else visible[..., None])
    if values.ndim == 3:
        values = _grey(path, values, stored)
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise PictureError(f"mask {printable(path)}: expected whole numbers, got fractions, NaN or infinity")
        values = values.astype(np.int64)
    return MaskValues(values, one_bit or one_colour or stored.lossy, stored.reasons)


def _of_palette(picture: Image.Image, opacity: np.ndarray | None) -> np.ndarray:
    """Indices (H, W) of a palette, or what they look like, where that is a grey picture or shown by opacity."""
    indices = np.asarray(picture)
    colours = np.array(picture.getpalette("RGB") or [], np.uint8)[:768].reshape(-1, 3)
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    seen = indices if opacity is None else indices[opacity > opacity.max() / 2]
    used = table[np.unique(seen)]
    grey = (colours == colours[:, :1]).all()
    if grey and (colours == 0).all(axis=1).any() and len(np.unique(used[:, 0])) == len(used):
        return table[indices, 0]
    if opacity is not None and opacity.min() != opacity.max() and len(np.unique(used, axis=0)) == 1:
        return table[indices]  # a brush of one colour: opacity is the mask
    return indices


def _divided(values: np.ndarray, opacity: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Colours that were multiplied by opacity, as they were where they are visible."""
    divided = values.copy()
    part = opacity[visible].astype(np.float64)
    most = np.iinfo(opacity.dtype).max
    part = part if values.ndim == 2 else part[:, None]
    divided[visible] = np.rint(values[visible] * (most / part)).clip(0, most)
    return divided


def _one_colour(values: np.ndarray, opacity: np.ndarray, visible: np.ndarray) -> bool:
    """Whether all that is visible has one colour; half transparent pixels may be off by what rounding leaves."""
    most = values[opacity == opacity.max()].astype(np.int64)
    if (most != most[:1]).any():
        return False
    return bool((abs(values[visible].astype(np.int64) - most[0]) <= 3).all())


def _grey(path: Path, values: np.ndarray, stored: Stored) -> np.ndarray:
    """The one value a pixel (H, W) of RGB (H, W, 3)."""
    if not (values != values[..., :1]).any():
        return values[..., 0]
    if stored.lossy:
        off = values.max(axis=2).astype(np.int16) - values.min(axis=2) > 32
        if off.mean() < 0.01:
            return np.rint(values.mean(axis=2)).astype(np.uint8)
    raise PictureError(f"mask {printable(path)}: expected one value a pixel (grey or palette), got colours")
