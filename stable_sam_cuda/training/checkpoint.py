"""Weights of ``sam_lite`` on disk: written whole or not at all."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from segment_anything.modeling import Sam
from torch import nn

from stable_sam_cuda.sam.atomic_file import atomic_write


def save_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``; a reader, or a kill, never meets half a file."""
    with atomic_write(path) as file:
        file.write(content)


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> None:
    """A ``sam_lite``'s weights as safetensors, with the metadata that ``build_sam_lite`` reads."""
    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    save_bytes(path, save(state, metadata={"model": "sam_lite", **metadata}))


def load_weights(sam: Sam, path: Path) -> None:
    """Load weights written by ``save_weights`` into a model of the same variant."""
    sam.load_state_dict(load_file(path))
