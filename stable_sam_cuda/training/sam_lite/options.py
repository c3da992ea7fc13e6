"""What a run of ``sam_lite``'s training is asked to do."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from stable_sam_cuda.sam.lite import REPEATS


@dataclass(frozen=True)
class Recipe:
    """What decides the result, but for the time; a run is continued with the same.

    Args:
        image_size: px, a multiple of 32. batch: pictures a step. objects: of a picture.
        copy_paste: how often objects of another picture are pasted onto one, 0 to 1.
        warmup: steps. ema: decay of the averaged weights.
    """

    variant: str = "lite0"
    image_size: int = 256
    batch: int = 8
    objects: int = 3
    copy_paste: float = 0.0
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """Where and how long; may change when a run is continued, as between two machines.

    Args:
        minutes: the whole run's, over which the learning rate falls; pause_after: minutes after which this call
            writes a checkpoint and ends. steps: stop after so many, if the time has not run out before.
        workers: processes that draw batches; 0 for a thread.
        half: encoder and decoder in bfloat16 (autocast), not the loss.
        overwrite: a run and its results in ``out`` may be replaced.
    """

    data: Path
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    init: Path | None = None
    minutes: float = 60
    steps: int | None = None
    pause_after: float | None = None
    validate_minutes: float = 15
    checkpoint_minutes: float = 5
    device: str = "cpu"
    workers: int = 0
    half: bool = False
    tensorboard: bool = False
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """
        Raises:
            ValueError: an option is out of range.
        """
        recipe = self.recipe
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected none with resume, which goes on with what is there")
        if recipe.variant not in REPEATS:
            raise ValueError(f"variant: expected one of {', '.join(REPEATS)}, got {recipe.variant!r}")
        if recipe.image_size < 64 or recipe.image_size % 32:
            raise ValueError(f"image-size: expected a multiple of 32 from 64 on, got {recipe.image_size}")
        for name in ("batch", "objects", "warmup"):
            if getattr(recipe, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(recipe, name)}")
        for name in ("copy_paste", "ema"):
            if not 0 <= getattr(recipe, name) <= 1:
                raise ValueError(f"{name.replace('_', '-')}: expected 0 to 1, got {getattr(recipe, name)}")
        above_zero = {"lr": recipe.lr, "minutes": self.minutes, "validate-minutes": self.validate_minutes}
        for name, value in above_zero.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")
