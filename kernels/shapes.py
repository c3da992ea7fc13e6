"""Every size of one deformable_sample call, as the kernels take it, and the tensors laid out to match."""

from typing import NamedTuple

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SamplingShape(NamedTuple):
    """The struct of csrc/sampling_shape.h: strides count elements, a batch stride of 0 broadcasts a batch of 1.

    Triton compiles a kernel anew where one of these becomes 1 or a multiple of 16. So nothing here follows from the
    number of prompts, which changes from call to call.
    """

    height: int
    width: int
    channels: int
    features_batch_stride: int
    identity_batch_stride: int
    amplitude_batch_stride: int
    offsets_batch_stride: int
    offsets_axis_stride: int
    offsets_row_stride: int
    offsets_column_stride: int


class SamplingInputs(NamedTuple):
    """The inputs in the memory order the kernels read: dense (B, H, W, C), offsets as they came."""

    batch: int
    features: Tensor
    offsets: Tensor
    identity: Tensor | None
    alpha: Tensor | None
    amplitude: Tensor | None
    shape: SamplingShape

    @property
    def amplitude_channels(self) -> int:
        """1 or C; 0 where there is no amplitude."""
        return 0 if self.amplitude is None else self.amplitude.shape[1]


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor dense in (B, H, W, C) order; itself where it is so already."""
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(batch: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (batch, C, H, W) in (B, H, W, C) memory order, else as ``like``."""
    shape = (batch, *like.shape[1:])
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def prepare_inputs(
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    batch: int | None = None,
) -> SamplingInputs:
    """Lay out the inputs of one call and measure them. ``batch``: prompts, where these tensors alone do not tell.

    Raises TypeError for a dtype that the kernels have no instance of.
    """
    if features.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            "features must be float32, float16 or bfloat16 for the Triton kernels, "
            f'got {features.dtype}; backend="reference" takes float64'
        )
    features = channels_last(features)
    identity = None if identity is None else channels_last(identity)
    amplitude = None if amplitude is None else channels_last(amplitude)
    given = [tensor for tensor in (features, offsets, identity, alpha, amplitude) if tensor is not None]
    batch = torch.broadcast_shapes(*[tensor.shape[:1] for tensor in given])[0] if batch is None else batch
    alpha = None if alpha is None else alpha.expand(batch, 2).contiguous()

    def is_shared(tensor: Tensor) -> bool:
        """By several prompts. One prompt has strides as many have."""
        return tensor.shape[0] == 1 and batch > 1

    def batch_stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None or is_shared(tensor) else tensor.shape[1:].numel()

    shape = SamplingShape(
        height=features.shape[2],
        width=features.shape[3],
        channels=features.shape[1],
        features_batch_stride=batch_stride(features),
        identity_batch_stride=batch_stride(identity),
        amplitude_batch_stride=batch_stride(amplitude),
        offsets_batch_stride=0 if is_shared(offsets) else offsets.stride(0),
        offsets_axis_stride=offsets.stride(1),
        offsets_row_stride=offsets.stride(2),
        offsets_column_stride=offsets.stride(3),
    )
    return SamplingInputs(batch, features, offsets, identity, alpha, amplitude, shape)


class AttentionInputs(NamedTuple):
    """Maps dense (B or 1, H, W, C), query rows dense (B, R, C), offsets as they came."""

    query_rows: Tensor
    features: Tensor
    identity: Tensor
    offsets: Tensor
    alpha: Tensor
    key_pe: Tensor
    shape: SamplingShape
    key_pe_batch_stride: int

    @property
    def pixels(self) -> int:
        return self.shape.height * self.shape.width

    @property
    def sampling(self) -> SamplingInputs:
        """The call of deformable_sample that u stands for."""
        batch = self.query_rows.shape[0]
        return SamplingInputs(batch, self.features, self.offsets, self.identity, self.alpha, None, self.shape)

    def of_prompts(self, prompts: slice) -> "AttentionInputs":
        """The inputs of these prompts alone; what all prompts share stays as it is."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        shared = {name for name, tensor in tensors.items() if tensor.shape[0] == 1}
        return self._replace(**{name: tensors[name][prompts] for name in tensors.keys() - shared})


def prepare_attention(
    query_rows: Tensor, features: Tensor, identity: Tensor, offsets: Tensor, alpha: Tensor, key_pe: Tensor
) -> AttentionInputs:
    """Lay out the inputs of one call and measure them.

    Raises TypeError for a dtype that the kernels have no instance of.
    """
    sampling = prepare_inputs(features, offsets, identity, alpha, None, batch=query_rows.shape[0])
    key_pe = channels_last(key_pe)
    return AttentionInputs(
        query_rows=query_rows.contiguous(),
        features=sampling.features,
        identity=sampling.identity,
        offsets=sampling.offsets,
        alpha=sampling.alpha,
        key_pe=key_pe,
        shape=sampling.shape,
        key_pe_batch_stride=0 if key_pe.shape[0] == 1 else key_pe.shape[1:].numel(),
    )
