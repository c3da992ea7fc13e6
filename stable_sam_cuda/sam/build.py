"""Base models by name."""

from os import PathLike

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from stable_sam_cuda.sam.base_models import BASE_MODELS
from stable_sam_cuda.sam.checkpoints import load_into
from stable_sam_cuda.sam.download import find_or_download
from stable_sam_cuda.sam.lite import build_sam_lite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load_sam(
    name: str,
    checkpoint: str | PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Sam:
    """A Segment Anything model with its weights, in evaluation mode.

    Args:
        name: ``"sam_lite"``, whose weights come with the package, or ``"vit_b"``, ``"vit_l"``, ``"vit_h"``.
        checkpoint: a local file; None for the package's own weights, or for Meta's from the local folder, into which
            they are downloaded once (see `find_or_download`).
        device: None for CUDA where PyTorch has it, else the CPU.
        dtype: float32, float16 or bfloat16, for image encoder and mask decoder. Prompt encoder and pixel statistics
            stay in float32, where coordinates keep their precision; use `StableSamPredictor`, which knows of both.

    Raises:
        ValueError: an unknown name or dtype; a checkpoint that is damaged, unsafe or of another model.
        FileNotFoundError: there is no such checkpoint.
        ConnectionError: Meta's checkpoint is neither there nor can be downloaded.
    """
    if name not in BASE_MODELS:
        raise ValueError(f"name: expected one of {', '.join(BASE_MODELS)}, got {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sam = build_sam_lite(checkpoint) if name == "sam_lite" else _build_vit(name, checkpoint)
    sam.to(device)
    sam.image_encoder.to(dtype)
    sam.mask_decoder.to(dtype)
    return sam


def _build_vit(name: str, checkpoint: str | PathLike[str] | None) -> Sam:
    path = find_or_download(name) if checkpoint is None else checkpoint
    # On the meta device nothing is allocated or initialised only to be overwritten.
    with torch.device("meta"):
        sam = sam_model_registry[name]()
    load_into(sam, path, name)
    return sam
