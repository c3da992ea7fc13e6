"""A run's curves for TensorBoard."""

import math
from pathlib import Path
from typing import Any

try:
    from torch.utils.tensorboard import SummaryWriter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("--tensorboard needs TensorBoard", name="tensorboard") from error

NAMES = {"loss": "loss", "iou": "IoU", "lr": "learning rate"}


class Scalars:
    """Loss, IoU and learning rate a step, and alpha_1 or a validation's IoU by prompt kind, in OUT/tensorboard."""

    def __init__(self, out: Path, step: int = 0) -> None:
        # What a killed run wrote of the steps after its checkpoint is hidden.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        """One step, or a validation after it; a step without an object has nothing to show."""
        loss = record.get("loss")
        if loss is not None and math.isfinite(loss):
            for key, name in NAMES.items():
                self.writer.add_scalar(name, record[key], record["step"])
        for group in ("alpha_1", "val"):
            for kind, value in record.get(group, {}).items():
                if math.isfinite(value):
                    self.writer.add_scalar(f"{group}/{kind}", value, record["step"])

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
