"""`offset_head`: depthwise convolution, LayerNorm, GELU and two offsets, against the eager chain."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from cases import Contestant, Group, Run
from contestants import compiled, fused_backend, head, head_eagerly
from operations import Limits, Operation, operation_groups
from shapes import HEAD, sizes

OFFSET_HEAD = Operation(
    truth=partial(head, backend="reference"),
    trained=("projected", *HEAD),
    maps=(1, 2),
    flops=lambda size: 2 * (25 + 2) * size.elements,  # 25 taps, two offsets
    # Of half types: the others round between their steps, and norms' gradients are sums of what they rounded.
    own=Limits(
        output={torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2},
        gradients={torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 0.1},
    ),
    others=Limits(
        output={torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.4},
        gradients={torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.5},
    ),
)


def heads(run: Run, place: int) -> list[Contestant]:
    backend = fused_backend(run.device)
    made = [OFFSET_HEAD.contestant("fused", partial(head, backend=backend), backend)]
    made.append(OFFSET_HEAD.contestant("eager", head_eagerly, nchw=True))
    if run.compiled:
        made.append(OFFSET_HEAD.contestant("compile", compiled(head_eagerly), nchw=True))
    return made


def head_groups(run: Run) -> Iterator[Group]:
    wanted = sizes(run, max_offset=1.0, tokens=7)
    return operation_groups(run, "offset_head", wanted, partial(heads, run), rounds=7, largest_backward=64)


@pytest.mark.groups(make=head_groups)
def test_offset_head(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
