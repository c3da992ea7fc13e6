"""The inputs of a call of each operation, laid out and measured as the kernels read them.

A kernel takes a NamedTuple as one argument, so that what belongs together is named once. Not in it are the few tensors
and numbers of launch.SMALL and launch.NUMBERS: in a tuple Triton specialises everything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import tile_count

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SampleShape(NamedTuple):
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
    key_pe_batch_stride: int
    max_offset: float


class Maps(NamedTuple):
    """What a call reads at the pixels of the map: dense (1 or B, H, W, C), offsets (1 or B, 2, H, W) as they came."""

    features: Tensor
    identity: Tensor | None
    offsets: Tensor
    amplitude: Tensor | None  # of 1 or C channels
    key_pe: Tensor | None  # of sampled_attention alone
    shape: SampleShape

    @property
    def pixels(self) -> int:
        return self.shape.height * self.shape.width

    def count_tiles(self, tile: tuple[int, int]) -> int:
        return tile_count(self.shape.height, self.shape.width, tile)

    def of_prompts(self, prompts: slice) -> "Maps":
        """The maps of these prompts alone; what all prompts share stays as it is."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**{name: value[prompts] for name, value in tensors.items() if value.shape[0] > 1})


class SampleInputs(NamedTuple):
    """The inputs of deformable_sample."""

    batch: int
    maps: Maps
    alpha: Tensor | None  # [B, 2]

    @property
    def amplitude_per_channel(self) -> bool:
        return self.maps.amplitude is not None and self.maps.amplitude.shape[1] > 1


class AttentionInputs(NamedTuple):
    """The inputs of sampled_attention."""

    query_rows: Tensor  # [B, R, C]
    maps: Maps
    alpha: Tensor  # [B, 2]

    @property
    def sample(self) -> SampleInputs:
        """The call of deformable_sample that u stands for."""
        maps = self.maps._replace(key_pe=None, shape=self.maps.shape._replace(key_pe_batch_stride=0))
        return SampleInputs(self.query_rows.shape[0], maps, self.alpha)

    def of_prompts(self, prompts: slice) -> "AttentionInputs":
        """The inputs of these prompts alone."""
        return AttentionInputs(self.query_rows[prompts], self.maps.of_prompts(prompts), self.alpha[prompts])


class HeadParameters(NamedTuple):
    """The parameters of offset_head, in the order and the shapes of ops/offset_head.py."""

    depthwise_weight: Tensor  # [C, 1, k, k]
    depthwise_bias: Tensor  # [C]
    norm_weight: Tensor  # [C]
    norm_bias: Tensor  # [C]
    pointwise_weight: Tensor  # [2, C, 1, 1]
    pointwise_bias: Tensor  # [2]


class HeadInputs(NamedTuple):
    """The inputs of offset_head: all parameters over the channels in one table of k * k + 5 rows.

    Its rows are the taps of the depthwise kernel, then the depthwise bias, the norm's weight and bias, and the
    pointwise weights of x and of y. So channels are contiguous for the taps, too, and one small copy prepares all.
    """

    features: Tensor  # [B, H, W, C]
    table: Tensor  # [k * k + 5, C]
    pointwise_bias: Tensor  # [2]
    kernel_size: int
    eps: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Height, width and k, as every kernel takes them: numbers, which another map does not compile anew."""
        return self.features.shape[2], self.features.shape[3], self.kernel_size


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor dense in (B, H, W, C) order; itself where it is so already."""
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(batch: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (batch, C, H, W) in (B, H, W, C) memory order, else as ``like``."""
    shape = (batch, *like.shape[1:])
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def prepare_sample(
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
) -> SampleInputs:
    """Lay out the inputs of one call and measure them. Raises TypeError for a dtype that the kernels have not."""
    given = [tensor for tensor in (features, offsets, identity, alpha, amplitude) if tensor is not None]
    batch = torch.broadcast_shapes(*[tensor.shape[:1] for tensor in given])[0]
    alpha = None if alpha is None else alpha.expand(batch, 2).contiguous()
    return SampleInputs(batch, _prepare_maps(batch, features, offsets, identity, amplitude, None, max_offset), alpha)


def prepare_attention(
    query_rows: Tensor,
    features: Tensor,
    identity: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    key_pe: Tensor,
    max_offset: float,
) -> AttentionInputs:
    """Lay out the inputs of one call and measure them. Raises TypeError for a dtype that the kernels have not."""
    batch = query_rows.shape[0]
    maps = _prepare_maps(batch, features, offsets, identity, None, key_pe, max_offset)
    return AttentionInputs(query_rows.contiguous(), maps, alpha.expand(batch, 2).contiguous())


def prepare_head(features: Tensor, parameters: HeadParameters, eps: float) -> HeadInputs:
    """Lay out the inputs of one call. Raises TypeError for a dtype that the kernels have not."""
    _check_dtype(features)
    weight, *vectors, pointwise_weight, pointwise_bias = parameters
    table = torch.cat((weight.flatten(1).t(), *[vector[None] for vector in vectors], pointwise_weight.flatten(1)))
    return HeadInputs(channels_last(features), table, pointwise_bias.contiguous(), weight.shape[-1], float(eps))


def split_table(table: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inverse of the table: its parameters in their shapes, without the pointwise bias."""
    taps = kernel_size**2
    channels = table.shape[1]
    depthwise = table[:taps].t().reshape(channels, 1, kernel_size, kernel_size)
    return depthwise, *table[taps : taps + 3], table[taps + 3 :].reshape(2, channels, 1, 1)


def _prepare_maps(
    batch: int,
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    amplitude: Tensor | None,
    key_pe: Tensor | None,
    max_offset: float,
) -> Maps:
    _check_dtype(features)
    images = (features, identity, amplitude, key_pe)
    features, identity, amplitude, key_pe = (None if image is None else channels_last(image) for image in images)

    def is_shared(tensor: Tensor) -> bool:
        """By several prompts. One prompt has strides as many have."""
        return tensor.shape[0] == 1 and batch > 1

    def batch_stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None or is_shared(tensor) else tensor.shape[1:].numel()

    shape = SampleShape(
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
        key_pe_batch_stride=batch_stride(key_pe),
        max_offset=float(max_offset),
    )
    return Maps(features, identity, offsets, amplitude, key_pe, shape)


def _check_dtype(features: Tensor) -> None:
    if features.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            "features must be float32, float16 or bfloat16 for the Triton kernels, "
            f'got {features.dtype}; backend="reference" takes float64'
        )
