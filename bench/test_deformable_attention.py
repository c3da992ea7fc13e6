"""The plugin with the attention that it feeds, against the eager chain and against plain SAM's attention.

``deformable_attention`` samples, blends and attends; ``layer`` is projection, offset head and that. "plain" is SAM's
attention without any plugin, "plain, sdpa" the same by PyTorch's fused attention.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from cases import Contestant, Group, Run
from contestants import (
    attend,
    attend_by_sdpa,
    attend_eagerly,
    attend_plainly,
    compiled,
    fused_backend,
    layer,
    layer_eagerly,
)
from operations import Limits, Operation, operation_groups
from shapes import HEAD, HEADS, PROJECTION, Size, sizes

COMPILED_SIZES = 2  # on a GPU: compiling takes most of the time
LARGEST_BACKWARD = 64  # prompts: eager PyTorch keeps some twenty maps of each


def pooling_flops(size: Size) -> float:
    """Attention with its projections absorbed: each head and token is a row, which meets every pixel twice."""
    return 2 * 2 * HEADS * size.tokens * size.elements


def attention_flops(size: Size) -> float:
    """4 taps and a blend, then the rows."""
    return 10 * size.elements + pooling_flops(size)


def layer_flops(size: Size) -> float:
    """Projection; 25 taps of the head's convolution and two offsets; attention."""
    return 2 * (size.channels + 25 + 2) * size.elements + attention_flops(size)


compare = partial(
    Operation,
    # Half types round x* and the offsets; gradients by offsets jump where that moves a location past an integer.
    own=Limits(
        output={torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2},
        gradients={torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.5},
    ),
    # grid_sample wants its grid in the features' dtype: in bfloat16 that is off by a tenth of a pixel at 64, moves the
    # output by 0.4 of its norm and changes gradients by offsets. What the chain computes is judged by its float32; of
    # the half types' gradients only that they are numbers.
    others=Limits(
        output={torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.6},
        gradients={torch.float32: 1e-2, torch.float16: math.inf, torch.bfloat16: math.inf},
    ),
)
# Forward the projection moves 2 maps, the head 1, the attention 2. Backward the attention moves 4 (x and x* read, both
# gradients written), the head 2, the projection 4 (the gradient of x* and x read; the gradient of x* again, that of x).
PLAIN = compare(attend_plainly, ("queries", "features"), (1, 2), pooling_flops)
FUSED_ATTENTION = ("features", "alpha", "projected", "offsets")
ATTENTION = compare(partial(attend, backend="reference"), FUSED_ATTENTION, (2, 4), attention_flops)
LAYER = compare(partial(layer, backend="reference"), ("features", "alpha", *PROJECTION, *HEAD), (5, 10), layer_flops)


def attentions(run: Run, operation: Operation, own: Callable, eager: Callable, place: int) -> list[Contestant]:
    backend = fused_backend(run.device)
    made = [operation.contestant("fused", partial(own, backend=backend), backend)]
    made.append(PLAIN.contestant("plain", attend_plainly))
    made.append(PLAIN.contestant("plain, sdpa", attend_by_sdpa))
    made.append(operation.contestant("eager", eager, nchw=True))
    if run.compiled or (operation is LAYER and run.on_cuda and not run.quick and place < COMPILED_SIZES):
        made.append(operation.contestant("compile", compiled(eager), nchw=True))
    return made


def groups(run: Run, name: str, operation: Operation, own: Callable, eager: Callable) -> Iterator[Group]:
    wanted = sizes(run, max_offset=1.0, tokens=7 if run.on_cuda else 8)
    contestants = partial(attentions, run, operation, own, eager)
    return operation_groups(run, name, wanted, contestants, rounds=7, largest_backward=LARGEST_BACKWARD)


@pytest.mark.groups(
    make=partial(groups, name="deformable_attention", operation=ATTENTION, own=attend, eager=attend_eagerly)
)
def test_deformable_attention(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)


@pytest.mark.groups(make=partial(groups, name="layer", operation=LAYER, own=layer, eager=layer_eagerly))
def test_layer(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
