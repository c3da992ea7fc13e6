"""Weights of ``sam_lite`` on disk: written whole or not at all."""

from pathlib import Path

import torch
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import nn

from stable_sam_cuda.files import save_bytes
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem
from stable_sam_cuda.sam.weight_files import read_safetensors


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> None:
    """A ``sam_lite``'s weights as safetensors, with the metadata that ``build_sam_lite`` reads."""
    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    save_bytes(path, save(state, metadata={"model": "sam_lite", **metadata}))


def load_weights(sam: Sam, path: Path) -> None:
    """Load weights written by ``save_weights`` into a model of the same variant.

    Raises:
        FileNotFoundError, ValueError: as `read_safetensors`, and where the weights do not fit or are not finite.
    """
    state, _ = read_safetensors(path, "init")
    if problem := fit_problem(state, sam.state_dict()):
        raise ValueError(f"init: {path} does not fit this model: {problem}")
    if bad := first_not_finite(state):
        raise ValueError(f"init: expected finite weights, got NaN or infinity in {bad} of {path}")
    sam.load_state_dict(state)
