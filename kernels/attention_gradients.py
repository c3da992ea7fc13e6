"""The gradients of one sampled_attention call while groups of prompts fill them."""

import torch
from torch import Tensor

from .attention_inputs import AttentionInputs
from .sampling_shape import empty_channels_last

QUERY_ROWS, FEATURES, IDENTITY, OFFSETS, ALPHA, KEY_PE = range(6)  # bits of grad_mask


class AttentionGradients:
    """Uninitialised tensors for the gradients asked for. Those of inputs that all prompts share, features, identity
    and key_pe of batch 1, are summed in float32 over the groups, in their order, and rounded once."""

    def __init__(self, inputs: AttentionInputs, grad_mask: int) -> None:
        batch, features = inputs.query_rows.shape[0], inputs.features
        make = {
            QUERY_ROWS: lambda: torch.empty_like(inputs.query_rows),
            FEATURES: lambda: empty_channels_last(features.shape[0], features),
            IDENTITY: lambda: empty_channels_last(inputs.identity.shape[0], inputs.identity),
            OFFSETS: lambda: features.new_empty((batch, 2, *features.shape[2:])),
            ALPHA: lambda: features.new_empty((batch, 2)),
            KEY_PE: lambda: empty_channels_last(inputs.key_pe.shape[0], inputs.key_pe),
        }
        self._gradients = {bit: made() for bit, made in make.items() if grad_mask >> bit & 1}
        self._sums: dict[int, Tensor] = {}
        self._batch = batch
        self._none = features.new_empty(0)

    def wanted(self, *bits: int) -> bool:
        """Whether any of these is asked for."""
        return any(bit in self._gradients for bit in bits)

    def shared(self, bit: int) -> bool:
        """Whether one gradient is asked for that sums over several prompts."""
        return bit in self._gradients and self._gradients[bit].shape[0] < self._batch

    def of_prompts(self, bit: int, prompts: slice) -> Tensor | None:
        """Where the gradients of these prompts belong; None where not asked for, or where prompts share one."""
        return None if not self.wanted(bit) or self.shared(bit) else self._gradients[bit][prompts]

    def empty_sum(self, bit: int) -> Tensor:
        """Room for one group's sum of a shared gradient, (1, C, H, W)."""
        return torch.empty_like(self._gradients[bit], dtype=torch.float32)

    def add(self, bit: int, sum_of_group: Tensor) -> None:
        self._sums[bit] = sum_of_group if bit not in self._sums else self._sums[bit].add_(sum_of_group)

    def zero(self) -> tuple[Tensor, ...]:
        """All six, of a call that has no pixels or no rows."""
        for gradient in self._gradients.values():
            gradient.zero_()
        return self.finish()

    def finish(self) -> tuple[Tensor, ...]:
        """All six in the mask's order, empty where not asked for."""
        for bit, total in self._sums.items():
            self._gradients[bit].copy_(total)
        return tuple(self._gradients.get(bit, self._none) for bit in range(6))
