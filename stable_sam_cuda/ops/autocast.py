"""Autocast policy: every floating-point input is cast to autocast's dtype; kernels sum in float32 anyway.

float64 inputs are left alone, as PyTorch's own autocast does.

The public functions cast before they call an op: torch.compile's cache of before 2.12 knows a graph by its calls and
whether autocast is on, not by autocast's dtype, and gave float16 where bfloat16 was asked for.
"""

from typing import Any

import torch
from torch import Tensor

from stable_sam_cuda.ops.schema import NAMESPACE

_autocast_library = torch.library.Library(NAMESPACE, "IMPL")


def autocast_dtype(features: Tensor) -> torch.dtype:
    """The dtype in which tensors like these features are taken here: autocast's where it is on, else their own."""
    device_type = features.device.type
    if torch.is_autocast_enabled(device_type) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return features.dtype


def cast_for_autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _register(operation_name: str, device_type: str) -> None:
    operation = getattr(torch.ops.stable_sam_cuda, operation_name)

    def cast_and_run(*arguments: Any) -> Any:
        """The op's tensors, some of them None, are followed by one number."""
        *tensors, number = arguments
        dtype = autocast_dtype(tensors[0])
        with torch.autocast(device_type, enabled=False):
            return operation(*[cast_for_autocast(tensor, dtype) for tensor in tensors], number)

    _autocast_library.impl(operation_name, cast_and_run, f"Autocast{device_type.upper()}")


for operation in ("deformable_sample", "sampled_attention", "offset_head"):
    for variant in (operation, f"{operation}_triton"):
        for device in ("cpu", "cuda"):
            _register(variant, device)
