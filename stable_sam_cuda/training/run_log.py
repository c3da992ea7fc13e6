"""The log of a run."""

import json
import math
from pathlib import Path
from typing import Any

from stable_sam_cuda.files import save_bytes
from stable_sam_cuda.notes import note

LOG = "log.jsonl"


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
