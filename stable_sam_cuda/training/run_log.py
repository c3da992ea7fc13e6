"""The log of a run."""

import json
from pathlib import Path


class RunLog:
    """Every step's record as a line of JSON in OUT/log.jsonl, and running means of loss and IoU."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "log.jsonl").open("a")
        self.loss = self.iou = float("nan")

    def add(self, record: dict[str, float]) -> None:
        """Write one step down."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.loss = _running(self.loss, record["loss"])
        self.iou = _running(self.iou, record["iou"])

    def close(self) -> None:
        """Nothing is added any more."""
        self.file.close()


def _running(mean: float, value: float) -> float:
    if value != value:
        return mean
    return value if mean != mean else 0.95 * mean + 0.05 * value
