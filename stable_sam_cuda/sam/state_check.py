"""Checks of weights read from a file, before they go into a model."""

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES_SHOWN = 3


def fit_problem(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What keeps ``found`` from loading into a model with state ``expected``, in words; None where nothing does."""
    if missing := sorted(expected.keys() - found.keys()):
        return f"missing weights: {_shortened(missing)}"
    if unknown := sorted(found.keys() - expected.keys()):
        return f"unknown weights: {_shortened(unknown)}"
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            return f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(found[name].shape)}"
        if not found[name].is_floating_point():
            return f"{name}: expected floating-point weights, got {found[name].dtype}"
    return None


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity."""
    return next((name for name, tensor in tensors.items() if not _all_finite(tensor)), None)


def _all_finite(tensor: Tensor) -> bool:
    # A finite sum proves finite terms at a fraction of the cost, which counts for ViT-H's 2.5 GB.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _shortened(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
