"""Sampling by a backend that is already chosen, inputs already checked: what the functions are made of."""

from functools import partial

import torch
from torch import Tensor

from stable_sam_cuda.backends import Backend
from stable_sam_cuda.ops import reference
from stable_sam_cuda.ops.autocast import autocast_dtype, cast_for_autocast


def sample_with(
    chosen: Backend,
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
) -> Tensor:
    dtype = autocast_dtype(features)
    cast = partial(cast_for_autocast, dtype=dtype)
    features, offsets = features.to(dtype), offsets.to(dtype)
    identity, alpha, amplitude = cast(identity), cast(alpha), cast(amplitude)
    if chosen is Backend.REFERENCE:
        return reference.deformable_sample(features, offsets, identity, alpha, amplitude, max_offset)
    operations = torch.ops.stable_sam_cuda
    operation = operations.deformable_sample_triton if chosen is Backend.TRITON else operations.deformable_sample
    return operation(features, offsets, identity, alpha, amplitude, max_offset)
