"""`deformable_sample`, forward and backward, against what PyTorch and others offer.

Sizes are SAM's: 256 channels, 64 x 64. Ideal bytes: each input read and each result written once, 3 maps forward and 5
backward. Memory is what a user has: on a CPU the default allocator, fresh outputs at every call, page faults included.
"""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import Case, Run
from contestants import (
    compiled,
    own_backends,
    sample,
    sample_by_deformops,
    sample_by_torchvision,
    sample_eagerly,
)
from operations import Contestant, Limits, Operation, operation_cases
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import sample_inputs, sizes
from turns import Turns

COMPILED_SIZES = 3  # on a GPU: compiling takes most of the time
# An element: 4 taps and a blend; their gradients by taps, locations, shares and identity. Locations are not counted.
FLOPS = {"forward": 10, "backward": 25, "forward+backward": 35}

SAMPLE = Operation(
    truth=partial(sample, backend="reference"),
    trained=("features", "offsets", "identity", "alpha"),
    maps={"forward": 3, "backward": 5, "forward+backward": 8},
    flops=lambda size, mode: FLOPS[mode] * size.map_elements,
    # What rounding the result to the dtype allows this project's kernels, and what rounding coordinates to it allows
    # the others (a bfloat16 grid is off by a tenth of a pixel at 64).
    limits=Limits(
        own={torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3},
        peers={torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.4},
    ),
    unjudged=("offsets",),  # its gradient jumps at integer locations; the tests judge it elsewhere
)


def samplers(run: Run, place: int) -> list[Contestant]:
    """Each in the memory layout that it prefers."""
    own = [Contestant(name, partial(sample, backend=name), SAMPLE, name) for name in own_backends(run.device)]
    others = [Contestant("eager", sample_eagerly, SAMPLE, nchw=True)]
    if run.on_cuda or place == 0:  # on a CPU it takes twenty times eager's time
        others.append(Contestant("deform_conv2d", sample_by_torchvision, SAMPLE, nchw=True))
    if run.compiled or (run.on_cuda and not run.quick and place < COMPILED_SIZES):
        others.append(Contestant("compile", compiled(sample_eagerly), SAMPLE, nchw=True))
    if run.on_cuda and find_spec("deformops"):
        others.append(Contestant("deformops", sample_by_deformops, SAMPLE))
    if not run.on_cuda:
        own += [Contestant("cpu, NCHW", partial(sample, backend="cpu"), SAMPLE, "cpu", nchw=True)]
    return own + others


def sample_cases(run: Run) -> Iterator[Case]:
    wanted = sizes(run, max_offset=2.0 if run.on_cuda else 1.0)
    return operation_cases(
        run, "deformable_sample", wanted, sample_inputs, partial(samplers, run), rounds=15, largest_backward=256
    )


@pytest.mark.cases(make=sample_cases)
def test_deformable_sample(case: Case, turns: Turns, benchmark: BenchmarkFixture) -> None:
    turns.report(case, benchmark)
