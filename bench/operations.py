"""Operations on tensors: their truth, how each contestant is verified, and the cases that follow."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from cases import Case, Run, Work
from contestants import Step
from shapes import Inputs, Size, in_float64, in_nchw, of_prompts, with_gradients
from timing import Call, poisoned, relative_error
from torch import Tensor

LARGEST_BACKWARD = 64  # prompts of a layer: eager PyTorch keeps some twenty maps of each


class Limits(NamedTuple):
    """Largest errors by dtype, of the norm of the truth: own results, others', and gradients if they differ."""

    own: dict[torch.dtype, float]
    peers: dict[torch.dtype, float]
    gradients: dict[torch.dtype, float] | None = None


class Operation(NamedTuple):
    """What contestants compute alike."""

    truth: Step  # in float64
    trained: tuple[str, ...]  # inputs whose gradients are timed
    maps: dict[str, int]  # image-sized tensors, fewest that are read or written
    flops: Callable[[Size, str], float]  # fewest: a multiply-add is 2; norms and softmax are not counted
    limits: Limits
    unjudged: tuple[str, ...] = ()  # inputs whose gradients jump where rounding decides


class Contestant(NamedTuple):
    """``backend``: of this project's own. ``nchw``: it prefers contiguous inputs to channels-last ones."""

    name: str
    step: Step
    operation: Operation
    backend: str | None = None
    nchw: bool = False


@dataclass
class Problem:
    """Inputs of one size, and what each operation makes of the first and the last prompt in float64."""

    inputs: Inputs
    size: Size
    gradients: bool
    _truths: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def grad_output(self, output: Tensor) -> Tensor:
        """Random numbers, laid out as ``output`` is."""
        generator = torch.Generator(output.device).manual_seed(1)
        return torch.randn(output.shape, generator=generator, device=output.device).to(self.size.dtype)

    def truths(self, operation: Operation) -> dict[str, Tensor]:
        if id(operation) not in self._truths:
            few = in_float64(of_prompts(self.inputs, self.size.ends))
            few = with_gradients(few, operation.trained)
            output = operation.truth(few)
            truths = {"output": output.detach()}
            if self.gradients:
                like = torch.empty(self.size.batch, *output.shape[1:], device=output.device, dtype=self.size.dtype)
                grad_output = self.grad_output(like)[self.size.ends].double()
                gradients = torch.autograd.grad(output, [getattr(few, name) for name in operation.trained], grad_output)
                truths |= {f"grad_{name}": g for name, g in zip(operation.trained, gradients, strict=True)}
            self._truths[id(operation)] = truths
        return self._truths[id(operation)]


def prepare(contestant: Contestant, mode: str, problem: Problem) -> Work:
    """The call that is timed, after its results for the first and the last prompt were compared with the truth."""
    operation, step, size = contestant.operation, contestant.step, problem.size
    inputs = in_nchw(problem.inputs) if contestant.nchw else problem.inputs
    truths = problem.truths(operation)
    with poisoned([inputs.features] * 4):
        if mode == "forward":
            with torch.no_grad():
                errors = {"output": relative_error(step(inputs)[size.ends], truths["output"])}
            call: Call = partial(_forward, step, inputs)
        else:
            leaves = with_gradients(inputs, operation.trained)
            output = step(leaves)
            grad_output = problem.grad_output(output)
            if output.dim() == 4 and not contestant.nchw:
                grad_output = grad_output.contiguous(memory_format=torch.channels_last)
            errors = _errors(operation, leaves, output, grad_output, truths, size)
            wanted = [getattr(leaves, name) for name in operation.trained]
            call = partial(torch.autograd.grad, output, wanted, grad_output, retain_graph=True)
    if mode == "forward+backward":
        call = partial(_forward_backward, step, inputs, operation.trained, grad_output)
    own, peers, of_gradients = operation.limits
    of_output = own if contestant.backend else peers
    return Work.verified(
        call, errors, lambda name: (of_output if name == "output" else of_gradients or of_output)[size.dtype]
    )


def _errors(
    operation: Operation, leaves: Inputs, output: Tensor, grad_output: Tensor, truths: dict[str, Tensor], size: Size
) -> dict[str, float]:
    """Where only the prompts compared have an incoming gradient, weights get theirs from these prompts alone."""
    judged = [name for name in operation.trained if name not in operation.unjudged]
    masked = torch.zeros_like(grad_output)
    masked[size.ends] = grad_output[size.ends]
    gradients = torch.autograd.grad(output, [getattr(leaves, name) for name in judged], masked, retain_graph=True)
    errors = {"output": relative_error(output.detach()[size.ends], truths["output"])}
    for name, gradient in zip(judged, gradients, strict=True):
        truth = truths[f"grad_{name}"]
        errors[f"grad_{name}"] = relative_error(
            gradient if gradient.shape == truth.shape else gradient[size.ends], truth
        )
    return errors


def _forward(step: Step, inputs: Inputs) -> Tensor:
    """As a predictor runs it."""
    with torch.no_grad():
        return step(inputs)


def _forward_backward(step: Step, inputs: Inputs, trained: tuple[str, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    leaves = with_gradients(inputs, trained)
    return torch.autograd.grad(step(leaves), [getattr(leaves, name) for name in trained], grad_output)


def operation_cases(
    run: Run,
    name: str,
    sizes: Iterable[Size],
    make_inputs: Callable[[Size, torch.device], Inputs],
    contestants: Callable[[int], list[Contestant]],
    rounds: int,
    largest_backward: int = LARGEST_BACKWARD,
) -> Iterator[Case]:
    """``contestants``: those at a size, by its place. On a CPU, backward is timed with the forward it needs."""
    for place, size in enumerate(sizes):
        for mode in ("forward", "backward" if run.on_cuda else "forward+backward"):
            if mode == "backward" and size.batch > largest_backward:
                continue

            def problem(size: Size = size, mode: str = mode) -> Problem:
                return Problem(make_inputs(size, run.device), size, mode != "forward")

            for cache in run.caches(mode, size.batch):
                for contestant in contestants(place):
                    operation = contestant.operation
                    moved = operation.maps.get(mode)
                    yield Case(
                        run.device,
                        name,
                        contestant.name,
                        mode,
                        size.dtype,
                        size.batch,
                        cache,
                        problem,
                        partial(prepare, contestant, mode),
                        contestant.backend is not None,
                        contestant.backend,
                        size.facts,
                        rounds,
                        ideal_bytes=moved * size.map_elements * size.dtype.itemsize,
                        flops=operation.flops(size, mode),
                    )
