"""The inputs of one sampled_attention call in the memory order the kernels read."""

from typing import NamedTuple

from torch import Tensor

from .sampling_shape import SamplingInputs, SamplingShape, channels_last, prepare_inputs


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
