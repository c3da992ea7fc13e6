"""Backward of sampled_attention: by recomputation, a few prompts at a time.

The gradient of u of some prompts is written, and the kernels of deformable_sample's backward carry it on
to features, identity, offsets and alpha; it is the largest temporary and never that of all prompts.
Nothing is added atomically and every sum has a fixed order, so the result is the same bit for bit in each run.
"""

import torch
from torch import Tensor

from ..launch import device_of, run_best
from ..sample.backward import fill_identity_gradient, fill_pixel_gradients
from ..sample.gather import fill_features_gradient
from ..shapes import AttentionInputs, SampleInputs, empty_channels_last, prepare_attention
from .backward_kernels import Incoming, grad_of_rows, grad_of_scores
from .plan import BACKWARD_TILE, ROWS_KERNEL, TILES_KERNEL, AttentionPlan, plan_name, rows_plans, tiles_plans

QUERY_ROWS, FEATURES, IDENTITY, OFFSETS, ALPHA, KEY_PE = range(6)  # bits of grad_mask
BYTES_AT_A_TIME = 64 << 20  # of temporaries: more than fills the device, and much of it stays in the cache
_THROUGH_SAMPLING = (FEATURES, IDENTITY, OFFSETS, ALPHA)


class AttentionGradients:
    """Uninitialised tensors for the gradients asked for. Those of inputs that all prompts share, features, identity
    and key_pe of batch 1, are summed in float32 over the groups, in their order, and rounded once."""

    def __init__(self, inputs: AttentionInputs, grad_mask: int) -> None:
        batch, features = inputs.query_rows.shape[0], inputs.maps.features
        make = {
            QUERY_ROWS: lambda: torch.empty_like(inputs.query_rows),
            FEATURES: lambda: empty_channels_last(features.shape[0], features),
            IDENTITY: lambda: empty_channels_last(inputs.maps.identity.shape[0], inputs.maps.identity),
            OFFSETS: lambda: features.new_empty((batch, 2, *features.shape[2:])),
            ALPHA: lambda: features.new_empty((batch, 2)),
            KEY_PE: lambda: empty_channels_last(inputs.maps.key_pe.shape[0], inputs.maps.key_pe),
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


def sampled_attention_backward(
    grad_pooled: Tensor,
    query_rows: Tensor,
    features: Tensor,
    identity: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    key_pe: Tensor,
    pooled: Tensor,
    logsumexp: Tensor,
    max_offset: float,
    grad_mask: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Triton's backward of the op in ops/, where shapes and (in register.py) ``grad_mask`` are explained.

    Raises TypeError for a dtype other than float32, float16 and bfloat16, and `NoPlanFitsError` as `run_best`.
    """
    inputs = prepare_attention(query_rows, features, identity, offsets, alpha, key_pe, max_offset)
    if query_rows.numel() == 0 or inputs.maps.pixels == 0:
        return AttentionGradients(inputs, grad_mask).zero()
    grad_pooled, logsumexp = grad_pooled.contiguous(), logsumexp.contiguous()
    incoming = Incoming(grad_pooled, logsumexp, (grad_pooled.float() * pooled.float()).sum(-1))
    _, rows, channels = query_rows.shape
    plans = tiles_plans(inputs.maps.features.dtype, channels, rows, device_of(inputs.maps.features))

    def run(plan: AttentionPlan) -> tuple[Tensor, ...]:
        return _by_groups_of_prompts(plan, inputs, incoming, grad_mask)

    return run_best(plan_name(TILES_KERNEL, inputs.maps.features.dtype, channels), plans, inputs.maps.features, run)


def _by_groups_of_prompts(
    plan: AttentionPlan, inputs: AttentionInputs, incoming: Incoming, grad_mask: int
) -> tuple[Tensor, ...]:
    gradients = AttentionGradients(inputs, grad_mask)
    if gradients.wanted(*range(6)):
        batch, together = inputs.query_rows.shape[0], _prompts_at_a_time(plan, inputs, gradients)
        for first in range(0, batch, together):
            prompts = slice(first, min(first + together, batch))
            group = Incoming(*[tensor[prompts] for tensor in incoming])
            _fill(plan, gradients, prompts, inputs.of_prompts(prompts), group)
    return gradients.finish()


def _sums_dtype(plan: AttentionPlan, inputs: AttentionInputs) -> torch.dtype:
    """Of gradients to which blocks of rows add one after the other: float32 where there are several."""
    return inputs.maps.features.dtype if inputs.query_rows.shape[1] <= plan.rows else torch.float32


def _prompts_at_a_time(plan: AttentionPlan, inputs: AttentionInputs, gradients: AttentionGradients) -> int:
    batch, rows, channels = inputs.query_rows.shape
    itemsize = _sums_dtype(plan, inputs).itemsize
    of_pixel = rows * inputs.maps.features.itemsize if gradients.wanted(QUERY_ROWS) else 0
    of_pixel += channels * itemsize if gradients.wanted(*_THROUGH_SAMPLING) else 0
    of_pixel += channels * 4 if gradients.wanted(KEY_PE) else 0
    return max(1, min(batch, BYTES_AT_A_TIME // (of_pixel * inputs.maps.pixels)))


def _fill(
    plan: AttentionPlan,
    gradients: AttentionGradients,
    prompts: slice,
    inputs: AttentionInputs,
    incoming: Incoming,
) -> None:
    """Every gradient of a group of prompts, whose inputs alone ``inputs`` are."""
    batch, rows, channels = inputs.query_rows.shape
    device, dtype, sums_dtype = inputs.maps.features.device, inputs.maps.features.dtype, _sums_dtype(plan, inputs)

    def image(dtype: torch.dtype) -> Tensor:
        shape = (batch, channels, inputs.maps.shape.height, inputs.maps.shape.width)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)

    grad_scores = grad_calibrated = None
    if gradients.wanted(QUERY_ROWS):
        tiles = inputs.maps.count_tiles(BACKWARD_TILE)
        pixels = BACKWARD_TILE[0] * BACKWARD_TILE[1]
        grad_scores = torch.empty((batch, tiles, pixels, rows), dtype=dtype, device=device)
    if gradients.wanted(*_THROUGH_SAMPLING):
        grad_calibrated = image(sums_dtype)
    own_key_pe = grad_key_pe = gradients.of_prompts(KEY_PE, prompts)
    if gradients.shared(KEY_PE) or (own_key_pe is not None and own_key_pe.dtype != sums_dtype):
        grad_key_pe = image(torch.float32)
    grad_of_scores(plan, inputs, incoming, grad_scores, grad_calibrated, grad_key_pe)

    if grad_scores is not None:
        own = gradients.of_prompts(QUERY_ROWS, prompts)
        run_best(
            plan_name(ROWS_KERNEL, dtype, channels),
            rows_plans(dtype, channels, rows, device_of(inputs.maps.features)),
            inputs.maps.features,
            lambda rows_plan: grad_of_rows(rows_plan, inputs, own, grad_scores),
        )
    if gradients.shared(KEY_PE):
        gradients.add(KEY_PE, grad_key_pe.sum(0, keepdim=True))
    elif own_key_pe is not grad_key_pe:
        own_key_pe.copy_(grad_key_pe)
    if grad_calibrated is not None:
        _through_sampling(gradients, prompts, inputs.sample, grad_calibrated)


def _through_sampling(
    gradients: AttentionGradients, prompts: slice, sample: SampleInputs, grad_calibrated: Tensor
) -> None:
    """From u on: the backward of deformable_sample."""
    if gradients.wanted(FEATURES):
        target = gradients.of_prompts(FEATURES, prompts)
        sum_of_group = gradients.empty_sum(FEATURES) if target is None else target
        fill_features_gradient(sum_of_group, grad_calibrated, sample)
        if target is None:
            gradients.add(FEATURES, sum_of_group)
    if gradients.shared(IDENTITY):
        sum_of_group = gradients.empty_sum(IDENTITY)
        fill_identity_gradient(sum_of_group, grad_calibrated, sample)
        gradients.add(IDENTITY, sum_of_group)
    of_each = [gradients.of_prompts(bit, prompts) for bit in (OFFSETS, IDENTITY, ALPHA)]
    if any(gradient is not None for gradient in of_each):
        fill_pixel_gradients(*of_each, None, grad_calibrated, sample)
