"""Autocast policy: every floating-point input is cast to autocast's dtype; kernels sum in float32 anyway.

float64 inputs are left alone, as PyTorch's own autocast does.

The functions cast before they call an op: torch.compile's cache of before 2.12 knows a graph by its calls and
whether autocast is on, not by autocast's dtype, and gave float16 where bfloat16 was asked for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which tensors like this one are taken here: autocast's where it is on, else their own."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def cast_for_autocast(inputs: Sequence[Any]) -> Sequence[Any]:
    """An op's inputs in the dtype in which its first tensor is taken; without autocast they are as they came."""
    first = inputs[0]
    if not torch.is_autocast_enabled(first.device.type):
        return inputs
    dtype = autocast_dtype(first)
    return [value.to(dtype) if isinstance(value, Tensor) else value for value in inputs]
