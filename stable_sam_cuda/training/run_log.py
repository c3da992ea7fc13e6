"""The log of a run."""

import json
from pathlib import Path
from typing import Any

from stable_sam_cuda.training.checkpoint import save_bytes


class RunLog:
    """Every step's record as a line of JSON in OUT/log.jsonl, and running means of loss and IoU.

    Lines of steps after ``step``, and a broken last line, are from a run that was killed: they are dropped, and
    the means are those of the lines that stay.
    """

    def __init__(self, out: Path, step: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.loss = self.iou = float("nan")
        path = out / "log.jsonl"
        for record in drop_newer(path, step):
            self._include(record)
        self.file = path.open("a")

    def add(self, record: dict[str, Any]) -> None:
        """Write one step down."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self._include(record)

    def close(self) -> None:
        """Nothing is added any more."""
        self.file.close()

    def _include(self, record: dict[str, Any]) -> None:
        self.loss = _running(self.loss, record["loss"])
        self.iou = _running(self.iou, record["iou"])


def drop_newer(path: Path, step: int) -> list[dict[str, Any]]:
    """Take the lines of steps after ``step``, and a broken last line, out of a log, if there is one; what stays."""
    if not path.is_file():
        return []
    records = [record for record in _records(path) if record["step"] <= step]
    save_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    return records


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _running(mean: float, value: float) -> float:
    if value != value:
        return mean
    return value if mean != mean else 0.95 * mean + 0.05 * value
