"""A step of the plugin's training from cached embeddings: decoder forward, loss, backward, Adam.

32 objects of 8 pictures on a GPU, 8 of 4 on a CPU; half types by autocast. "fused" is what a user gets, "reference" is
``backend="reference"``, "eager" grid_sample and two blends; decoder and loss are the same for all three.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from cases import Contestant, Group, Run, Work
from contestants import fused_backend
from decoder_contestants import (
    EagerPlugin,
    TrainingBatch,
    TrainingStep,
    copied,
    errors_of,
    facts,
    in_float64,
    make_training_batch,
    stable_sam,
    with_plugin,
    with_reference,
)
from segment_anything.modeling import Sam
from timing import poisoned
from torch import Tensor

# Of the norm of the truth. Convolutions may take TF32 in float32.
LARGEST_ERROR = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LARGEST_ERROR_OF_GRADIENTS = {torch.float32: 0.1, torch.float16: 0.1, torch.bfloat16: 0.2}

Problem = tuple[TrainingBatch, dict[str, Tensor]]


def with_truths(run: Run, pictures: int, objects: int, dtype: torch.dtype) -> Problem:
    """The batch, and the same step in float64 by plain PyTorch."""
    exact = in_float64(stable_sam(run, torch.float32))
    batch = make_training_batch(exact, pictures, objects)
    doubled = batch._replace(embeddings=batch.embeddings.double(), targets=batch.targets.double())
    truths = TrainingStep(exact, doubled, torch.float64).results()
    if dtype != torch.float32:  # gradients by offsets jump where rounding moves a location past an integer: too many
        del truths["offset_network"]
    return batch, truths


def prepare(change: Callable[[Sam], Sam], run: Run, dtype: torch.dtype, problem: Problem) -> Work:
    """``change`` makes the contestant's copy of the model."""
    batch, truths = problem
    step = TrainingStep(change(stable_sam(run, torch.float32)), batch, dtype)
    with poisoned([batch.embeddings] * 8):
        errors = errors_of(step.results(), truths)
    return Work(step, errors).verified(
        lambda name: (LARGEST_ERROR if name == "loss" else LARGEST_ERROR_OF_GRADIENTS)[dtype]
    )


def training_groups(run: Run) -> Iterator[Group]:
    pictures, objects = (2, 2) if run.quick else (8, 4) if run.on_cuda else (4, 2)
    for dtype in (torch.bfloat16, torch.float32, torch.float16) if run.on_cuda else (torch.float32,):
        made = [
            Contestant("fused", partial(prepare, copied, run, dtype), fused_backend(run.device)),
            Contestant("eager", partial(prepare, partial(with_plugin, plugin=EagerPlugin), run, dtype)),
            Contestant("reference", partial(prepare, with_reference, run, dtype)),
        ]
        problem = partial(with_truths, run, pictures, objects, dtype)
        for cache in run.caches("step", pictures * objects):
            size = ("step", dtype, pictures * objects, cache, run.device, facts(run))
            yield Group("training_step", *size, problem, made, rounds=5)


@pytest.mark.groups(make=training_groups)
def test_training_step(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
