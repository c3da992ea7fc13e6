"""Reads SAM checkpoints safely: no code in a file is ever run, and a file that does not fit is named with its fault."""

import pickle
import zipfile
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.sam.base_models import VIT_NAMES
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem

PATCH_EMBEDDING = "image_encoder.patch_embed.proj.weight"


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` (PyTorch) or ``.safetensors`` file, memory-mapped where the format allows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, would run code on loading, or holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {path}, which does not exist")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"checkpoint: expected a dictionary of named tensors, got {type(state).__name__} in {path}")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"checkpoint: expected tensors alone, got {type(value).__name__} as {name!r} in {path}")
    return dict(state)


def load_into(sam: Sam, path: str | PathLike[str], model_name: str) -> None:
    """Give ``sam``, which may lie on the meta device, the weights of a checkpoint file.

    Args:
        model_name: what the checkpoint is expected to be, for messages.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`, and where the weights do not fit or are not finite.
    """
    state = read_checkpoint(path)
    if problem := fit_problem(state, sam.state_dict()):
        resembles = _resembled_model(state)
        hint = f" (it looks like {resembles})" if resembles not in (None, model_name) else ""
        raise ValueError(f"checkpoint: expected the weights of {model_name}, got {path}{hint}: {problem}")
    if bad := first_not_finite(state):
        raise ValueError(f"checkpoint: expected finite weights, got NaN or infinity in {bad} of {path}")
    sam.load_state_dict(state, assign=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: expected a whole .safetensors file, got {path}: {error}") from error


def _read_pytorch(path: Path) -> object:
    is_zip = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"
    if starts_as_zip and not is_zip:
        raise ValueError(f"checkpoint: expected a whole PyTorch file, got {path}, which is truncated")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: expected a PyTorch file of plain tensors, got {path}, which is damaged or would run code "
            f"on loading: {_first_line(error)}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes the unpickler stumble over
        raise ValueError(f"checkpoint: expected a whole PyTorch file, got {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _resembled_model(state: dict[str, Tensor]) -> str | None:
    weight = state.get(PATCH_EMBEDDING)
    names = {width: name for (width, _), name in VIT_NAMES.items()}
    return None if weight is None or weight.dim() != 4 else names.get(weight.shape[0])
