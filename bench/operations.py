"""Operations on tensors: their truth, how a contestant is verified, and the groups that follow."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from cases import Contestant, Group, Run, Work
from contestants import Step
from shapes import Inputs, Size, mapped, of_prompts, with_gradients
from timing import Call, poisoned, relative_error
from torch import Tensor

Errors = dict[torch.dtype, float]


class Limits(NamedTuple):
    """Largest errors by dtype, of the norm of the truth; infinite where any number will do."""

    output: Errors
    gradients: Errors


class Operation(NamedTuple):
    """What contestants compute alike.

    truth: in float64. trained: inputs whose gradients are timed; unjudged: those whose gradient jumps where rounding
    decides. maps: image-sized tensors, fewest that are read or written, forward and backward. flops: fewest forward, a
    multiply-add is 2; norms and softmax are not counted; ``backward_flops`` times as many backward.
    own, others: of this project's contestants and of all others.
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

    def __init__(self, inputs: Inputs, size: Size, mode: str) -> None:
        self.inputs, self.size, self.mode = inputs, size, mode
        self._truths: dict[int, dict[str, Tensor]] = {}

    def grad_output(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(shape, generator=generator, device=device).to(self.size.dtype)

    def truths(self, operation: Operation) -> dict[str, Tensor]:
        if id(operation) not in self._truths:
            few = with_gradients(mapped(of_prompts(self.inputs, self.size.ends), Tensor.double), operation.trained)
            output = operation.truth(few)
            self._truths[id(operation)] = {"output": output.detach()}
            if self.mode != "forward":
                grad_output = self.grad_output((self.size.batch, *output.shape[1:]), output.device)
                wanted = [few[name] for name in operation.trained]
                gradients = torch.autograd.grad(output, wanted, grad_output[self.size.ends].double())
                self._truths[id(operation)] |= dict(zip(operation.trained, gradients, strict=True))
        return self._truths[id(operation)]


def prepare(operation: Operation, step: Step, own: bool, nchw: bool, problem: Problem) -> Work:
    """The call that is timed, after its results for the first and the last prompt were compared with the truth."""
    size, mode, truths = problem.size, problem.mode, problem.truths(operation)
    inputs = mapped(problem.inputs, Tensor.contiguous) if nchw else problem.inputs
    with poisoned([inputs["features"]] * 4):
        if mode == "forward":
            call: Call = partial(forward, step, inputs)
            errors = {"output": relative_error(call()[size.ends], truths["output"])}
        else:
            leaves = with_gradients(inputs, operation.trained)
            output = step(leaves)
            grad_output = problem.grad_output(output.shape, output.device)
            if output.dim() == 4 and not nchw:
                grad_output = grad_output.contiguous(memory_format=torch.channels_last)
            # Where only the prompts compared have an incoming gradient, weights get theirs from these prompts alone.
            masked = torch.zeros_like(grad_output)
            masked[size.ends] = grad_output[size.ends]
            errors = {"output": relative_error(output.detach()[size.ends], truths["output"])}
            gradients = torch.autograd.grad(output, [leaves[n] for n in operation.trained], masked, retain_graph=True)
            for name, gradient in zip(operation.trained, gradients, strict=True):
                if name not in operation.unjudged:
                    compared = gradient if gradient.shape == truths[name].shape else gradient[size.ends]
                    errors[name] = relative_error(compared, truths[name])
            wanted = [leaves[name] for name in operation.trained]
            call = partial(torch.autograd.grad, output, wanted, grad_output, retain_graph=True)
            if mode == "forward+backward":
                call = partial(forward_backward, step, inputs, operation.trained, grad_output)
    limits = operation.own if own else operation.others
    parts = {"forward": (1, 0), "backward": (0, 1), "forward+backward": (1, 1)}[mode]
    maps = sum(part * count for part, count in zip(parts, operation.maps, strict=True))
    flops = operation.flops(size) * (parts[0] + parts[1] * operation.backward_flops)
    work = Work(call, errors, maps * size.elements * size.dtype.itemsize, flops)
    return work.verified(lambda name: (limits.output if name == "output" else limits.gradients)[size.dtype])


def forward(step: Step, inputs: Inputs) -> Tensor:
    """As a predictor runs it."""
    with torch.no_grad():
        return step(inputs)


def forward_backward(step: Step, inputs: Inputs, trained: tuple[str, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    leaves = with_gradients(inputs, trained)
    return torch.autograd.grad(step(leaves), [leaves[name] for name in trained], grad_output)


def operation_groups(
    run: Run,
    name: str,
    sizes: list[Size],
    make_inputs: Callable[[Size, torch.device], Inputs],
    contestants: Callable[[int], list[Contestant]],
    rounds: int,
    largest_backward: int = 256,
) -> Iterator[Group]:
    """``contestants``: those at a size, by its place. On a CPU backward is timed with the forward that it needs."""
    for place, size in enumerate(sizes):
        for mode in ("forward", "backward" if run.on_cuda else "forward+backward"):
            if mode == "forward" or size.batch <= largest_backward:

                def problem(size: Size = size, mode: str = mode) -> Problem:
                    return Problem(make_inputs(size, run.device), size, mode)

                facts, entries = (size.dtype, size.batch), contestants(place)
                for cache in run.caches(mode, size.batch):
                    yield Group(name, mode, *facts, cache, run.device, size.facts, problem, entries, rounds)
