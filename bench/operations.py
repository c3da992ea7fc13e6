"""Operations on tensors: their truth, how a contestant is verified, and the groups that follow."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from cases import Contestant, Group, Run, Work
from contestants import Step
from shapes import BATCHED, Inputs, Size, make_inputs, mapped, with_gradients
from timing import Call, poisoned, relative_error
from torch import Tensor


class Limits(NamedTuple):
    """Largest errors by dtype, of the norm of the truth; infinite where any number will do."""

    output: dict[torch.dtype, float]
    gradients: dict[torch.dtype, float]


class Operation(NamedTuple):
    """What contestants compute alike.

    truth: in float64. trained: inputs whose gradients are timed; unjudged: those whose gradient jumps where rounding
    decides. maps: image-sized tensors, fewest that are read or written, forward and backward. flops: fewest forward, a
    multiply-add is 2; norms and softmax are not counted; ``backward_flops`` times as many backward.
    own, others: errors of this project's contestants and of all others.
    """

    truth: Step
    trained: tuple[str, ...]
    maps: tuple[int, int]
    flops: Callable[[Size], float]
    own: Limits
    others: Limits
    unjudged: tuple[str, ...] = ()
    backward_flops: float = 2.0  # a product has two factors, and each gets its gradient by one more

    def contestant(self, name: str, step: Step, backend: str | None = None, nchw: bool = False) -> Contestant:
        """``nchw``: it prefers contiguous inputs to channels-last ones."""
        return Contestant(name, partial(prepare, self, step, backend is not None, nchw), backend)


class Problem:
    """Inputs of one size, and what each operation makes of the first and the last prompt in float64."""

    def __init__(self, run: Run, size: Size, mode: str) -> None:
        self.inputs, self.size, self.mode = make_inputs(size, run.device), size, mode
        self.peak_memory = run.peak_memory and not run.on_cuda and mode == "forward"
        self._truths: dict[int, dict[str, Tensor]] = {}

    def grad_output(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(shape, generator=generator, device=device).to(self.size.dtype)

    def truths(self, operation: Operation) -> dict[str, Tensor]:
        if id(operation) not in self._truths:
            ends, trained = self.size.ends, operation.trained
            few = {name: value[ends] if name in BATCHED else value for name, value in self.inputs.items()}
            few = with_gradients(mapped(few, Tensor.double), trained)
            output = operation.truth(few)
            found = {"output": output.detach()}
            if self.mode != "forward":
                grad_output = self.grad_output((self.size.batch, *output.shape[1:]), output.device)[ends].double()
                gradients = torch.autograd.grad(output, [few[name] for name in trained], grad_output)
                found |= zip(trained, gradients, strict=True)
            self._truths[id(operation)] = found
        return self._truths[id(operation)]


def prepare(operation: Operation, step: Step, own: bool, nchw: bool, problem: Problem) -> Work:
    """The call that is timed, after its results for the first and the last prompt were compared with the truth."""
    size, mode, trained, truths = problem.size, problem.mode, operation.trained, problem.truths(operation)
    inputs = mapped(problem.inputs, Tensor.contiguous) if nchw else problem.inputs
    call: Call = partial(forward, step, inputs)
    with poisoned([inputs["features"]] * 4):
        if mode == "forward":
            errors = {"output": relative_error(call()[size.ends], truths["output"])}
        else:
            leaves = with_gradients(inputs, trained)
            output, wanted = step(leaves), [leaves[name] for name in trained]
            grad_output = problem.grad_output(output.shape, output.device)
            if output.dim() == 4 and not nchw:
                grad_output = grad_output.contiguous(memory_format=torch.channels_last)
            errors = {"output": relative_error(output.detach()[size.ends], truths["output"])}
            # Where only the prompts compared have an incoming gradient, weights get theirs from these prompts alone.
            masked = torch.zeros_like(grad_output)
            masked[size.ends] = grad_output[size.ends]
            gradients = torch.autograd.grad(output, wanted, masked, retain_graph=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if name not in operation.unjudged:
                    compared = gradient if gradient.shape == truths[name].shape else gradient[size.ends]
                    errors[name] = relative_error(compared, truths[name])
            call = partial(torch.autograd.grad, output, wanted, grad_output, retain_graph=True)
            if mode == "forward+backward":
                call = partial(forward_backward, step, inputs, trained, grad_output)
    limits = operation.own if own else operation.others
    parts = {"forward": (1, 0), "backward": (0, 1), "forward+backward": (1, 1)}[mode]
    maps = sum(part * count for part, count in zip(parts, operation.maps, strict=True))
    flops = operation.flops(size) * (parts[0] + parts[1] * operation.backward_flops)
    peak = partial(resident_peak, step, nchw, size) if problem.peak_memory else None
    work = Work(call, errors, maps * size.elements * size.dtype.itemsize, flops, peak)
    return work.verified(lambda name: (limits.output if name == "output" else limits.gradients)[size.dtype])


def forward(step: Step, inputs: Inputs) -> Tensor:
    """As a predictor runs it."""
    with torch.no_grad():
        return step(inputs)


def forward_backward(step: Step, inputs: Inputs, trained: tuple[str, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    leaves = with_gradients(inputs, trained)
    return torch.autograd.grad(step(leaves), [leaves[name] for name in trained], grad_output)


def resident_peak(step: Step, nchw: bool, size: Size) -> int:
    """Bytes that a forward call adds to the resident size of a fresh process, in which malloc gives back what is freed.

    On Linux.
    """
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with patch.dict(os.environ, variables), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_resident_peak, step, nchw, size).result()


def _resident_peak(step: Step, nchw: bool, size: Size) -> int:
    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    one, inputs = (make_inputs(each, torch.device("cpu")) for each in (size._replace(batch=1), size))
    inputs = mapped(inputs, Tensor.contiguous) if nchw else inputs
    forward(step, one)  # libraries and threads come first
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    forward(step, inputs)
    return resident("VmHWM") - before


def operation_groups(
    run: Run,
    name: str,
    sizes: list[Size],
    contestants: Callable[[int], list[Contestant]],
    rounds: int,
    largest_backward: int = 256,
) -> Iterator[Group]:
    """``contestants``: those at a size, by its place. On a CPU backward is timed with the forward that it needs."""
    for place, size in enumerate(sizes):
        for mode in ("forward", "backward" if run.on_cuda else "forward+backward"):
            if mode == "forward" or size.batch <= largest_backward:
                problem, made = partial(Problem, run, size, mode), contestants(place)
                for cache in run.caches(mode, size.batch):
                    facts = (size.dtype, size.batch, cache, run.device, size.facts)
                    yield Group(name, mode, *facts, problem, made, rounds)
