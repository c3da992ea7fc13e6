"""The calls of the compile matrix: every plan, and every pair of values of dtype, channels, map, prompts and the rest.

All tensors are without data: the calls are made to see what they launch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kernels import (
    deformable_sample,
    deformable_sample_backward,
    offset_head,
    offset_head_backward,
    sampled_attention,
    sampled_attention_backward,
)


class Call(NamedTuple):
    """One call of an operation, forward and every backward."""

    operation: str
    dtype: str
    channels: int
    map: tuple[int, int]
    prompts: int
    variant: int = 0  # rows of the attention, side of the offset head's kernel, channels of the sampler's amplitude
    shared: bool = False  # one image for all prompts

    def __str__(self) -> str:
        sizes = f"{self.dtype} C={self.channels} {self.map[0]}x{self.map[1]} B={self.prompts}"
        return f"{self.operation} {sizes} {self.variant}{' one image' if self.shared else ''}"


DTYPES = ("float32", "float16", "bfloat16")
CHANNELS = (33, 256, 512)
MAPS = ((64, 64), (72, 72), (1, 64), (64, 1), (1, 1))
PROMPTS = (1, 64)
FACTORS: dict[str, tuple[Sequence[Any], ...]] = {
    "attention": (DTYPES, CHANNELS, MAPS, PROMPTS, (8, 56, 72, 160, 512), (False, True)),
    "sampler": (DTYPES, CHANNELS, MAPS, PROMPTS, (0, 1, -1), (False, True)),
    # Whose kernels take the map's sides as they come: another map compiles nothing anew.
    "offset head": (DTYPES, CHANNELS, MAPS[-1:], PROMPTS[:1], (1, 3, 5, 7), (False,)),
}
# A call a plan: the commonest of all, and with few channels, which compile fast.
QUICK = [
    Call("attention", "float32", 33, (1, 1), 1, 8),
    Call("attention", "bfloat16", 33, (64, 1), 64, 72, True),
    Call("sampler", "float32", 33, (1, 64), 1, -1),
    Call("sampler", "bfloat16", 256, (64, 64), 64, 0),
    Call("offset head", "bfloat16", 64, (1, 1), 1, 3),
]


# Calls that have every plan of the attention among theirs: float16 has those of bfloat16.
PLANS = [
    Call("attention", dtype, channels, (64, 64), 64, rows)
    for dtype, channels, rows in itertools.product(("float32", "bfloat16"), (256, 512), (56, 160))
]


def pairwise(operation: str) -> Iterator[Call]:
    """Every plan, and calls in which every two values of two factors meet at least once; cheap ones are preferred."""
    factors = FACTORS[operation]
    product = [Call(operation, *values) for values in itertools.product(*factors)]

    def pairs(call: Call) -> set[tuple[int, Any, int, Any]]:
        values = call[1:]
        return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}

    def cost(call: Call) -> float:
        """The attention's, roughly: its chunks of channels are unrolled, and products of float32 are, too."""
        of_product = 4 if call.dtype == "float32" else 1
        return max(call.channels, 64) * of_product if operation == "attention" else 1

    missing = set().union(*map(pairs, product))
    for call in PLANS if operation == "attention" else ():
        missing -= pairs(call)
        yield call
    while missing:
        best = max(product, key=lambda call: len(pairs(call) & missing) / cost(call))
        missing -= pairs(best)
        yield best


def call_attention(call: Call) -> None:
    batch, rows, dtype = call.prompts, call.variant, getattr(torch, call.dtype)
    images = 1 if call.shared else batch
    query_rows = torch.empty((batch, rows, call.channels), dtype=dtype, device="meta")
    features, key_pe = image(images, call), image(1, call)
    offsets = torch.empty((images, 2, *call.map), dtype=dtype, device="meta")
    inputs = (query_rows, features, features, offsets, query_rows.new_empty(batch, 2), key_pe)
    results = sampled_attention(*inputs, 2.0)
    # What a plugin's training asks for; where compiling is cheap the positional encoding, too.
    grad_mask = 0b111111 if call.channels < 256 else 0b011111
    sampled_attention_backward(query_rows, *inputs, *results, 2.0, grad_mask)


def call_sampler(call: Call) -> None:
    batch, dtype = call.prompts, getattr(torch, call.dtype)
    features = image(1 if call.shared else batch, call)
    offsets, alpha = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((batch, 2, *call.map), (batch, 2)))
    amplitude = image(batch, call, call.channels if call.variant < 0 else 1) if call.variant else None
    for routed in (True, False) if call.prompts == 1 else (True,):
        inputs = (features, offsets, features if routed else None, alpha if routed else None, amplitude, 2.0)
        output = deformable_sample(*inputs)
        deformable_sample_backward(output, *inputs, 31 if routed else 3, True)


def call_head(call: Call) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, call.dtype), device="meta")

    channels, side = call.channels, call.variant
    parameters = (empty(channels, 1, side, side), *[empty(channels) for _ in range(3)])
    inputs = (image(call.prompts, call), *parameters, empty(2, channels, 1, 1), empty(2), 1e-6)
    output = offset_head(*inputs)
    offset_head_backward(output, *inputs, 0b1111111)


def image(batch: int, call: Call, channels: int | None = None) -> torch.Tensor:
    """Without data, channels-last."""
    shape = (batch, channels or call.channels, *call.map)
    dtype = getattr(torch, call.dtype)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


CALLS: dict[str, Callable[[Call], None]] = {
    "attention": call_attention,
    "sampler": call_sampler,
    "offset head": call_head,
}
