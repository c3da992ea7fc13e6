"""Checks of user input that the functions share: every error names the argument, what was expected and what came."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Beyond it float32 does not tell neighbouring pixels apart.
_LARGEST_MAX_OFFSET = float(2**24)


def check_tensors(tensors: Mapping[str, object]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def check_image(name: str, tensor: Tensor) -> tuple[int, int, int]:
    """Its channels, height and width, where it is (B, C, H, W) of a dtype that the operations take."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected shape (B, C, H, W), got {tuple(tensor.shape)}")
    _, channels, height, width = tensor.shape
    return channels, height, width


def check_batched(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], ...]], like: Tensor
) -> None:
    """Each tensor like ``like``, of one of its expected shapes behind the batch, and batches that broadcast."""
    batch, device, dtype = 1, like.device, like.dtype
    for name, tensor in tensors.items():
        if tensor.device != device or tensor.dtype != dtype:
            _check_alike(name, tensor, like)
        if tensor.dim() == 0 or tuple(tensor.shape[1:]) not in expected[name]:
            raise ValueError(f"{name}: expected shape {_describe(expected[name])}, got {tuple(tensor.shape)}")
        own_batch = tensor.shape[0]
        if own_batch != 1 and batch not in (1, own_batch):
            raise ValueError(f"{name}: expected batch 1 or {batch}, as the tensors before it have, got {own_batch}")
        batch = batch if own_batch == 1 else own_batch


def check_parameters(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], like: Tensor) -> None:
    """Each tensor like ``like``, and of its expected shape."""
    device, dtype = like.device, like.dtype
    for name, tensor in tensors.items():
        if tensor.device != device or tensor.dtype != dtype:
            _check_alike(name, tensor, like)
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: expected shape {expected[name]}, got {tuple(tensor.shape)}")


def check_max_offset(max_offset: object) -> None:
    if isinstance(max_offset, bool) or not isinstance(max_offset, (int, float)):
        raise TypeError(f"max_offset: expected a number of pixels, got {type(max_offset).__name__}")
    if not (math.isfinite(max_offset) and 0 <= max_offset <= _LARGEST_MAX_OFFSET):
        raise ValueError(f"max_offset: expected a finite number of pixels from 0 to 2**24, got {max_offset}")


def _check_alike(name: str, tensor: Tensor, features: Tensor) -> None:
    """One device, and one dtype unless autocast makes them alike."""
    if tensor.device != features.device:
        raise ValueError(f"{name}: expected device {features.device}, that of features, got {tensor.device}")
    if tensor.dtype != features.dtype:
        if tensor.dtype in DTYPES and torch.is_autocast_enabled(features.device.type):
            return
        raise TypeError(f"{name}: expected dtype {features.dtype}, that of features, got {tensor.dtype}")


def _describe(expected: tuple[tuple[int, ...], ...]) -> str:
    """((1, 5), (8, 5)) -> '(B or 1, 1 or 8, 5)'."""
    axes = [" or ".join(map(str, dict.fromkeys(sizes))) for sizes in zip(*expected, strict=True)]
    return f"({', '.join(['B or 1', *axes])})"
