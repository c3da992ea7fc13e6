"""Weights on disk: written whole or not at all."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from segment_anything.modeling import Sam
from torch import nn


def save_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, then rename: a reader, or a kill, never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> None:
    """A ``sam_lite``'s weights as safetensors, with the metadata that ``build_sam_lite`` reads."""
    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    save_atomically(path, save(state, metadata={"model": "sam_lite", **metadata}))


def load_weights(sam: Sam, path: Path) -> None:
    """Load weights written by ``save_weights`` into a model of the same variant."""
    sam.load_state_dict(load_file(path))
