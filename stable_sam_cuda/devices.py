"""The device that a name stands for, on this machine and in this process."""

import os

import torch


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where torch has it, else the CPU), ``cpu``, ``cuda`` or ``cuda:N`` as a device that is there.

    Raises:
        ValueError: another name, or a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (colon and not (index.isascii() and index.isdigit()))):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            found = "torch sees none" if count == 0 else f"torch sees {count}"
            raise ValueError(f"--device: expected a CUDA device of this machine ({found}), got {name!r}")
    return torch.device(name)


def own_device(device: str) -> str:
    """``cuda``, and ``auto`` where there is CUDA, become the GPU of this process's own."""
    if "LOCAL_RANK" not in os.environ or not (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        return device
    return f"cuda:{os.environ['LOCAL_RANK']}"
