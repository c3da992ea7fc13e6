"""The learning rate over a run."""

import math

FLOOR = 0.02


def cosine(progress: float) -> float:
    """Factor of the learning rate at a part of the run in [0, 1]: from 1 down to `FLOOR` along a cosine."""
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1, progress))) / 2
