"""Options of the training loop."""

import math
from dataclasses import dataclass, field

import torch

from stable_sam_cuda.data.prompts import ROBUST, PromptMix

LOSSES = ("mask", "points")
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingOptions:
    """Options of one run: a step takes ``images * accumulate`` pictures, at most ``objects`` objects of each.

    Args:
        minimum_area: of the input frame; smaller objects are not trained on.
        accumulate: groups of ``images`` pictures whose gradients make one step.
        together: pictures that go through the model at once; the result is the same to rounding.
        amp: dtype of the forward pass under autocast; the parameters stay as they are.
        loss: where cross-entropy and dice are taken: over the whole "mask", or at PointRend's "points", most of them
            where the answer is uncertain, as HQ-SAM has it.
        time_budget: minutes to train for, instead of ``epochs``; the learning rate falls with the time used.
        checkpoint_every: steps.
    """

    epochs: int = 1
    images: int = 4
    objects: int = 3
    lr: float = 5e-4
    minimum_area: float = 0.001
    mix: PromptMix = field(default_factory=lambda: ROBUST)
    seed: int = 0
    checkpoint_every: int = 50
    accumulate: int = 1
    together: int = 1
    amp: str = "off"
    loss: str = "mask"
    time_budget: float | None = None

    def check(self, device: torch.device) -> None:
        """
        Raises:
            ValueError: an option is out of range, or not for this device.
        """
        for name in ("epochs", "images", "objects", "checkpoint_every", "accumulate", "together"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: expected a finite number above 0, got {self.lr}")
        if self.time_budget is not None and not (math.isfinite(self.time_budget) and self.time_budget > 0):
            raise ValueError(f"time-budget: expected minutes above 0, got {self.time_budget}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.amp not in AMP_DTYPES:
            raise ValueError(f"amp: expected one of {', '.join(AMP_DTYPES)}, got {self.amp!r}")
        if self.amp == "fp16" and device.type != "cuda":
            raise ValueError(f"amp: expected bf16 or off on {device.type} (fp16 needs a CUDA device), got fp16")
