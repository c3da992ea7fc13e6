"""Pictures with masks, as the verbs that take ``--data`` use them: what is broken is said and left out."""

import os
from collections.abc import Sequence
from pathlib import Path

from stable_sam_cuda.cli.console import say_note, say_plain
from stable_sam_cuda.notes import printable
from stable_sam_cuda.progress import progress_shown


def check_data(data: Path, split: str | None) -> None:
    """Refuse data that are not there, before the packages that read them are asked for.

    Raises:
        OSError: naming the option.
    """
    if not os.path.lexists(data):
        raise FileNotFoundError(
            f"--data: expected a folder or a COCO file, got {printable(data)}, which does not exist"
        )
    if not os.access(data, os.R_OK):
        raise PermissionError(f"--data: expected a folder or file that can be read, got {printable(data)}")
    if split is not None and not (data / "splits.json").is_file():
        raise FileNotFoundError(
            f"--split: expected splits named in {printable(data / 'splits.json')}, got no such file"
        )


def usable_samples(samples: Sequence, quiet: bool = False) -> list:
    """The samples that can be loaded; a line on stderr for each of the others, and their number.

    Args:
        quiet: says nothing, as all but the first of several processes.

    Raises:
        ValueError: none is left.
    """
    from stable_sam_cuda.data.dataset import check_samples

    with progress_shown(quiet, transient=True) as progress:
        progress.begin("checking", len(samples))
        good, broken = check_samples(samples, progress.advance)
    if not quiet:
        for name, reason in broken:
            say_plain(f"skipped {printable(name)}: {reason}")
        if broken:
            say_note(f"{len(broken)} of {len(samples)} pictures skipped")
    if not good:
        name, reason = broken[0]
        raise ValueError(
            f"--data: expected pictures with masks, got {len(broken)} broken ones; the first, {printable(name)}: "
            f"{reason}"
        )
    return good
