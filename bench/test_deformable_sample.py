"""`deformable_sample`, forward and backward, against what PyTorch and others offer.

Sizes are SAM's: 256 channels, 64 x 64. Ideal bytes: each input read and each result written once, 3 maps forward and 5
backward. Memory is what a user has: on a CPU the default allocator, fresh outputs at every call, page faults included.
"""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import Contestant, Group, Run
from contestants import compiled, own_backends, sample, sample_by_deformops, sample_by_torchvision, sample_eagerly
from operations import Limits, Operation, operation_groups
from shapes import sizes

COMPILED_SIZES = 3  # on a GPU: compiling takes most of the time
# What rounding the result to the dtype allows this project's kernels, and what rounding coordinates to it allows the
# others (a bfloat16 grid is off by a tenth of a pixel at 64).
OWN_ERRORS = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OTHER_ERRORS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.4}

SAMPLE = Operation(
    truth=partial(sample, backend="reference"),
    trained=("projected", "offsets", "features", "alpha"),
    unjudged=("offsets",),  # jumps at integer locations; the tests judge it elsewhere
    maps=(3, 5),
    flops=lambda size: 10 * size.elements,  # 4 taps and a blend; locations are not counted
    backward_flops=2.5,  # by taps, locations, shares and identity
    own=Limits(OWN_ERRORS, OWN_ERRORS),
    others=Limits(OTHER_ERRORS, OTHER_ERRORS),
)


def samplers(run: Run, place: int) -> list[Contestant]:
    """Each in the memory layout that it prefers."""
    made = [SAMPLE.contestant(name, partial(sample, backend=name), name) for name in own_backends(run.device)]
    if not run.on_cuda:
        made.append(SAMPLE.contestant("cpu, NCHW", partial(sample, backend="cpu"), "cpu", nchw=True))
    made.append(SAMPLE.contestant("eager", sample_eagerly, nchw=True))
    if run.compiled or (run.on_cuda and not run.quick and place < COMPILED_SIZES):
        made.append(SAMPLE.contestant("compile", compiled(sample_eagerly), nchw=True))
    if run.on_cuda or place == 0:  # with more prompts on a CPU it takes ten times eager's time
        made.append(SAMPLE.contestant("deform_conv2d", sample_by_torchvision, nchw=True))
    if run.on_cuda and find_spec("deformops"):
        made.append(SAMPLE.contestant("deformops", sample_by_deformops))
    return made


def sample_groups(run: Run) -> Iterator[Group]:
    wanted = sizes(run, max_offset=2.0 if run.on_cuda else 1.0, tokens=None)
    return operation_groups(run, "deformable_sample", wanted, partial(samplers, run), rounds=15)


@pytest.mark.groups(make=sample_groups)
def test_deformable_sample(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
