"""What a mask file means: one rule, decided for a set of masks as a whole.

A mask means one of three things:

- ``binary``: one object, where the mask is brighter than half its brightest value. Edges may be soft.
- ``instances``: a value is the id of its object, 0 the background.
- ``void``: as ``instances``, but one value is no object: a border of undecided pixels, as Pascal VOC has it. It is 255
  in masks of 8 bits; in those of more bits, taken together, the least of 255, 65535, 2^31-1 and 2^32-1 that no value
  lies above.

``auto`` finds out which from the files of a set together (up to 256 of them, spread evenly), by
`stable_sam_cuda.data.mask_evidence`, and tells once where it is in doubt. A file that contradicts its set is told
and read as the set is. The same look is taken where ``binary`` is given, since layouts give it, too: it is told where
the masks seem to hold ids all the same. JPEG and lossy WebP keep no ids, and one bit holds none: such a file is one
object in any set.

What the values of a file are, stands in `stable_sam_cuda.data.mask_values`.

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

from stable_sam_cuda.data.mask_evidence import (
    BINARY,
    INSTANCES,
    VOID,
    Evidence,
    evidence_of,
    is_void,
    may_be_void,
    verdict_of,
    verdict_of_set,
)
from stable_sam_cuda.data.mask_values import MaskValues, read_values
from stable_sam_cuda.notes import note, printable

RULE = "mask 3"  # changes whenever the same file would be read differently: caches keep it
MEANINGS = ("auto", BINARY, INSTANCES, VOID)
MAX_FILES = 256
SETTLE = "say --masks binary, instances or void if it is otherwise"
NO_IDS = "a lossy or one-bit mask among masks of ids is read as one object"
NO_IDS_IN_OPACITY = "a mask that is kept as transparency among masks of ids is read as one object"
LIKE_IDS = (
    "the masks seem to hold ids, but are read as one object each: "
    "say --masks instances if each value is an object of its own"
)
VOIDS = (255, 65535, (1 << 31) - 1, (1 << 32) - 1)


class MaskSet:
    """Masks that mean the same thing, such as those of one folder.

    Args:
        paths: the masks' files; none is read before the meaning is asked for, or a mask.
        meaning: one of `MEANINGS`.

    Raises:
        ValueError: the meaning is unknown.
    """

    def __init__(self, paths: Sequence[Path], meaning: str = "auto") -> None:
        if meaning not in MEANINGS:
            raise ValueError(f"masks: expected one of {', '.join(MEANINGS)}, got {meaning!r}")
        self.paths = tuple(paths)
        self._meaning = None if meaning == "auto" else meaning
        self._void = 0
        self._looked = meaning == INSTANCES
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[tuple[Path, ...], str], dict[str, int | bool]]:
        state: dict[str, int | bool] = {"_void": self._void, "_looked": self._looked}
        return MaskSet, (self.paths, self._meaning or "auto"), state

    @property
    def meaning(self) -> str:
        """``binary``, ``instances`` or ``void``; ``auto`` is decided at the first call. Files that fail do not count.

        Any thread may ask.
        """
        return self._meaning or self._decided()[0]

    @property
    def rule(self) -> str:
        """The meaning, and of ``void`` the value: what decides, beside a file's bytes, on what is read."""
        meaning = self.meaning
        return f"{meaning} {self._decided()[1]}" if meaning == VOID else meaning

    def read(self, path: Path) -> np.ndarray:
        """Object ids (H, W), uint8 or uint16, 0 being background, of a mask of this set.

        Raises:
            FileNotFoundError, ValueError, OSError: the file cannot be read, or its pixels name no object.
        """
        mask = read_values(path)
        meaning, void = self._decided()
        for reason in mask.reasons:
            note(reason, path)
        if mask.one_object and meaning != BINARY:
            note(NO_IDS_IN_OPACITY if mask.by_opacity else NO_IDS, path)
        return ids_of(path, mask, meaning, void)

    def _decided(self) -> tuple[str, int]:
        """The meaning, and the void value of masks of more than 8 bits."""
        with self._lock:
            if not self._looked or self._meaning is None:
                self._meaning, self._void = self._decide(self._meaning)
                self._looked = True
            return self._meaning, self._void

    def _decide(self, given: str | None) -> tuple[str, int]:
        count = min(len(self.paths), MAX_FILES)
        chosen = [self.paths[place * len(self.paths) // count] for place in range(count)]
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
            looked = [(path, part) for path, part in zip(chosen, workers.map(_look, chosen), strict=True) if part]
        paths, looks = [path for path, _ in looked], [look for _, look in looked]
        with_ids = [look for look in looks if not look.one_object]
        void = _least_void(max((look.most for look in with_ids if look.wide), default=0))
        if given is not None:
            _doubt(given, paths, with_ids, void)
            return given, void
        return decide(paths, looks, void), void


def read_ids(path: Path, masks: str = "auto") -> np.ndarray:
    """Object ids (H, W), uint8 or uint16, of a mask file that is a set of its own.

    Args:
        masks: what it means, one of `MEANINGS`.

    Raises:
        FileNotFoundError, ValueError, OSError: as `MaskSet` and `MaskSet.read`.
    """
    return MaskSet([path], masks).read(path)


def _least_void(most: int) -> int:
    """The void value of masks whose largest value is ``most``."""
    return next((void for void in VOIDS if void >= most), 0)


def _folder(paths: Sequence[Path]) -> str:
    return os.path.commonpath([path.parent for path in paths]) if len(paths) > 1 else str(*paths)


def _doubt(given: str, paths: Sequence[Path], looks: Sequence["Look"], void: int) -> None:
    """Say where the masks themselves contradict the meaning that they were given."""
    if not looks:
        return
    if given == BINARY:
        verdict = verdict_of_set([look.evidence for look in looks])
        if verdict is not None and verdict.sure and verdict.meaning == INSTANCES:
            note(LIKE_IDS, _folder(paths))
    elif not any((void if look.wide else 255) in look.evidence.values for look in looks):
        values = " or ".join(str(one) for one in sorted({void if look.wide else 255 for look in looks}))
        note(f"none of the masks has the value {values}, so that there is no border to leave out", _folder(paths))


def decide(paths: Sequence[Path], looks: Sequence["Look"], void_if_wide: int) -> str:
    """The meaning of masks, told where it is in doubt, and which of them contradict it."""
    parts = [look.evidence for look in looks if not look.one_object]
    verdict = verdict_of_set(parts)
    if verdict is None:
        return BINARY
    folder = _folder(paths)
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
    for wide, void in ((False, 255), (True, void_if_wide)):
        same_width = [look.evidence for look in looks if look.wide == wide and not look.one_object]
        if is_void(same_width, void):
            note(f"the value {void} beside ids that run from 1 is read as a border without object: {SETTLE}", folder)
            return VOID
        if may_be_void(same_width, void):
            settle = "say --masks void if it is a border of undecided pixels"
            note(f"the value {void} beside other ids is read as an id, too: {settle}", folder)
    return INSTANCES


class Look(NamedTuple):
    """What a look at one file gives; ``wide``: it has more than 8 bits; ``most``: its largest value."""

    evidence: Evidence
    one_object: bool
    wide: bool
    most: int


def _look(path: Path) -> Look | None:
    """Evidence of one file; None of one that cannot be read, which is told when it is used."""
    try:
        mask = read_values(path)
    except (ValueError, OSError):
        return None
    wide = mask.values.dtype != np.uint8
    return Look(evidence_of(mask.values), mask.one_object, wide, int(mask.values.max()))


def ids_of(path: Path, mask: MaskValues, meaning: str, void_if_wide: int) -> np.ndarray:
    """Object ids (H, W), uint8 or uint16, of a mask's values; ``void_if_wide``: the border in more than 8 bits.

    Raises:
        ValueError: there are more different values than 16 bits hold.
    """
    values = mask.values
    brightest = values.max()
    if mask.one_object or meaning == BINARY:
        return (values > max(brightest, 0) / 2).astype(np.uint8)
    if meaning == VOID:
        void = 255 if values.dtype == np.uint8 else void_if_wide
        values = np.where(values == void, 0, values).astype(values.dtype)
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
