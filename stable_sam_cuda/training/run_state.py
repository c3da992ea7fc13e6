"""A run's checkpoint on disk."""

from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from stable_sam_cuda.training.checkpoint import save_bytes

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
    """
    path = out / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Options that the run did not have yet were at their defaults.
        then = asdict(type(options)()) | state["options"]
    except (RuntimeError, UnpicklingError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"out: expected a whole checkpoint in {path}, got a damaged one: {error}") from error
    now = asdict(options)
    differing = [name for name in now if name not in FREE_OPTIONS and then[name] != now[name]]
    if differing:
        wanted, found = ({name: values[name] for name in differing} for values in (then, now))
        raise ValueError(f"out: expected the options of the run in {out}, {wanted}, got {found}")
    return state


def remove_partial(out: Path) -> None:
    """Clear away what a kill in the middle of `write_state` left; a large model's would soon fill the disk."""
    for path in out.glob(f".{CHECKPOINT}.*.part"):
        path.unlink(missing_ok=True)
