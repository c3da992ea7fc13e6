"""A run's checkpoint on disk."""

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stable_sam_cuda.data.digests import Digests
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.files import partial_files, save_bytes
from stable_sam_cuda.notes import note, printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHECKPOINT = "checkpoint.pt"
FREE_OPTIONS = ("checkpoint_every",)  # they do not change the result: a run may be continued with others


def write_state(out: Path, options: "DataclassInstance", state: dict[str, Any]) -> None:
    """Write a run's state to OUT/checkpoint.pt, whole or not at all: an error leaves the one before in place."""
    buffer = BytesIO()
    torch.save({"options": asdict(options), **state}, buffer)
    save_bytes(out / CHECKPOINT, buffer.getbuffer())


def read_state(out: Path, options: "DataclassInstance") -> dict[str, Any]:
    """What `write_state` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, or of a run with other options.
        OSError: it cannot be read.
    """
    path = out / CHECKPOINT
    with whole_checkpoint(out):
        # torch reads flipped bits as numbers; the archive's checksums tell.
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise ValueError(f"bad checksum of {member}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Options that the run did not have yet were at their defaults.
        then = asdict(type(options)()) | state["options"]
    now = asdict(options)
    differing = [name for name in now if name not in FREE_OPTIONS and then[name] != now[name]]
    if differing:
        wanted, found = ({name: values[name] for name in differing} for values in (then, now))
        raise ValueError(f"out: expected the options of the run in {printable(out)}, {wanted}, got {found}")
    return state


@contextmanager
def whole_checkpoint(out: Path) -> Iterator[None]:
    """Whatever reading the checkpoint raises in the block becomes the error that it is damaged.

    Raises:
        ValueError: in place of any exception but those of a file that cannot be read and of memory.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes and values of other types can raise anything
        path, reason = printable(out / CHECKPOINT), " ".join(str(error).split())
        raise ValueError(
            f"out: expected a whole checkpoint in {path}, got a damaged one: {type(error).__name__} {reason}"
        ) from error


def sample_contents(samples: Sequence[Sample], digests: Digests) -> dict[str, Any]:
    """What a checkpoint says of its samples: names, and digests (N, 32) uint8 of pictures and objects."""
    found = b"".join(bytes.fromhex(digest) for digest in digests.of_samples(samples))
    return {
        "names": [printable(sample.name) for sample in samples],
        "digests": torch.frombuffer(bytearray(found), dtype=torch.uint8).reshape(len(samples), 32),
    }


def check_contents(out: Path, state: dict[str, Any], samples: Sequence[Sample], digests: Digests) -> None:
    """See that a run goes on with the pictures and objects that it began with, in their order.

    Checkpoints of earlier versions know names alone, or nothing of them.

    Raises:
        ValueError: they differ; the message says how many, and names the first.
    """
    then = state.get("samples")
    if then is None:
        note("the checkpoint is of an earlier version and does not know what its pictures held", out / CHECKPOINT)
        names = hashlib.sha256(b"\n".join(os.fsencode(sample.name) for sample in samples)).hexdigest()
        if state.get("pictures", names) != names:
            raise ValueError(f"out: the run in {printable(out)} trains on other pictures; choose an empty folder")
        return
    with whole_checkpoint(out):
        before = list(zip(then["names"], (bytes(row.tolist()) for row in then["digests"]), strict=True))
    found = sample_contents(samples, digests)
    now = list(zip(found["names"], (bytes(row.tolist()) for row in found["digests"]), strict=True))
    if before == now:
        return
    raise ValueError(
        f"out: the run in {printable(out)} trains on other pictures: {_difference(before, now)}; "
        "choose an empty folder, or bring them back"
    )


def _difference(before: list[tuple[str, bytes]], now: list[tuple[str, bytes]]) -> str:
    then, held = dict(before), dict(now)
    kinds = {
        "changed": [name for name, digest in before if name in held and held[name] != digest],
        "missing": [name for name in Counter(name for name, _ in before) if name not in held],
        "new": [name for name in Counter(name for name, _ in now) if name not in then],
    }
    told = [f"{len(names)} {kind} (the first is {names[0]})" for kind, names in kinds.items() if names]
    if told:
        return ", ".join(told)
    places = [place for place, (one, other) in enumerate(zip(before, now, strict=False)) if one != other]
    first = now[places[0]][0] if places else now[-1][0]
    return f"{len(places) or abs(len(before) - len(now))} in another order (the first is {first})"


def remove_partial(out: Path) -> None:
    """Clear away what a kill in the middle of `write_state` left; a large model's would soon fill the disk."""
    for path in partial_files(out / CHECKPOINT):
        path.unlink(missing_ok=True)
