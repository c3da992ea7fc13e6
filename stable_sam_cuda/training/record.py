"""What a run leaves in its folder while it goes on: checkpoint, log, and curves for TensorBoard."""

import hashlib
import json
import math
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
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
FREE_OPTIONS = ("checkpoint_every",)  # they do not change the result: a run may be continued with others
CURVE_NAMES = {"loss": "loss", "iou": "IoU", "lr": "learning rate"}


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


def json_line(record: Any, **options: Any) -> str:
    """JSON as every reader takes it: NaN and infinity become null."""
    return json.dumps(_without_nan(record), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Every step's record as a line of JSON in OUT/log.jsonl, and running means of loss and IoU.

    Lines of steps after ``step``, and a broken last line, are from a run that was killed: they are dropped, and
    the means are those of the lines that stay. The means are None before a step has an object.
    """

    def __init__(self, out: Path, step: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.loss: float | None = None
        self.iou: float | None = None
        path = out / LOG
        for record in drop_newer(path, step):
            self._include(record)
        self.file = path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Write one step down."""
        self.file.write(json_line(record) + "\n")
        self.file.flush()
        self._include(record)

    def close(self) -> None:
        """Nothing is added any more."""
        self.file.close()

    def _include(self, record: dict[str, Any]) -> None:
        self.loss = _running(self.loss, record.get("loss"))
        self.iou = _running(self.iou, record.get("iou"))


def drop_newer(path: Path, step: int) -> list[dict[str, Any]]:
    """Take the lines of steps after ``step``, and those that are no records, out of a log, if there is one; what stays.

    A broken last line is what a kill leaves; other broken lines are said.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    found = [_record(line) for line in lines]
    if None in found[:-1]:
        note("lines that are no records of steps are dropped from the log", path)
    records = [record for record in found if record is not None and record["step"] <= step]
    save_bytes(path, "".join(json_line(record) + "\n" for record in records).encode())
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    """A step's record, None where the line is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    figures = [record.get("loss"), record.get("iou")]
    return record if all(value is None or type(value) in (int, float) for value in figures) else None


def _running(mean: float | None, value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return mean
    return value if mean is None else 0.95 * mean + 0.05 * value


def summary_writer() -> "type[SummaryWriter]":
    """TensorBoard's writer, which is asked for before a run begins, and only by a run that wants curves.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--tensorboard needs TensorBoard", name="tensorboard") from error
    return SummaryWriter


class Curves:
    """Loss, IoU and learning rate a step, and alpha_1 or a validation's IoU by prompt kind, in OUT/tensorboard."""

    def __init__(self, out: Path, step: int = 0) -> None:
        # What a killed run wrote of the steps after its checkpoint is hidden.
        self.writer = summary_writer()(str(out / "tensorboard"), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        """One step, or a validation after it; a step without an object has nothing to show."""
        loss = record.get("loss")
        if loss is not None and math.isfinite(loss):
            for key, name in CURVE_NAMES.items():
                self.writer.add_scalar(name, record[key], record["step"])
        for group in ("alpha_1", "val"):
            for kind, value in record.get(group, {}).items():
                if math.isfinite(value):
                    self.writer.add_scalar(f"{group}/{kind}", value, record["step"])

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
