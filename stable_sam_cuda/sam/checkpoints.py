"""Reads SAM checkpoints safely: no code in a file is ever run, and a file that does not fit is named with its fault."""

from os import PathLike
from pathlib import Path

from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.sam.base_models import VIT_NAMES
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem
from stable_sam_cuda.sam.weight_files import SUFFIX, read_pytorch, read_safetensors

PATCH_EMBEDDING = "image_encoder.patch_embed.proj.weight"


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` (PyTorch) or ``.safetensors`` file, in memory of their own (see `weight_files`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, would run code on loading, holds something else than named tensors, or
            changes while it is read.
    """
    path = Path(path)
    safe = path.suffix == SUFFIX
    state = read_safetensors(path, "checkpoint")[0] if safe else read_pytorch(path, "checkpoint")
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


def _resembled_model(state: dict[str, Tensor]) -> str | None:
    weight = state.get(PATCH_EMBEDDING)
    names = {width: name for (width, _), name in VIT_NAMES.items()}
    return None if weight is None or weight.dim() != 4 else names.get(weight.shape[0])
