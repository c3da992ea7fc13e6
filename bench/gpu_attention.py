"""Times the plugin with its attention against eager PyTorch, torch.compile and plain SAM's attention, verified first.

    python bench/gpu_attention.py [--device cuda] [--seconds 80] [--output FILE.json] [--tiny]

"layer" is projection, offset head, sampling and attention; "plain" SAM's attention without any plugin; "offset_head"
and "attention" the two steps alone. The most telling sizes come first; what the time does not allow is listed as
skipped. Percentages are of a large copy's bandwidth in the same run, on the fewest maps that each has to move, and of a
large bfloat16 matrix product's rate, on the fewest products that each has to compute, norms and softmax not counted.
"""

from collections.abc import Callable, Iterator

import torch
from attention_providers import OPERATIONS, OWN, Contestant, Step, contestants
from attention_shapes import SIZES, TINY, LayerTensors, Size, make_tensors
from gpu_session import Job, Record, Session, poison, relative_error, run_benchmark

# Of the norm of the truth. Half types round x* and the offsets, and grid_sample wants its grid in the features' dtype,
# a tenth of a pixel in bfloat16. Gradients by offsets jump where rounding moves a location past an integer.
LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LARGEST_ERROR_OF_PEERS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.4}
LARGEST_ERROR_OF_GRADIENTS = {torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.5}
LARGEST_BACKWARD = 64  # prompts: eager PyTorch keeps some twenty maps of each
COMPILED_SIZES = 2  # compiling takes most of the time
BACKWARD_FLOPS = 2  # of the forward's: a product has two factors, and each gets its gradient by one more


def with_gradients(tensors: LayerTensors, names: tuple[str, ...]) -> LayerTensors:
    """Fresh leaves of these names."""
    return tensors._replace(**{name: getattr(tensors, name).detach().requires_grad_() for name in names})


def verify(contestant: Contestant, step: Step, tensors: LayerTensors) -> dict[str, float]:
    """Relative errors on the first two prompts, against the reference in float64."""
    operation = OPERATIONS[contestant.operation]
    few = with_gradients(tensors.first_prompts(2), operation.trained)
    doubles = with_gradients(few.double(), operation.trained)
    truth = operation.truth(doubles)
    poison(few)
    output = step(few)
    errors = {"output": relative_error(output, truth)}
    grad_output = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [getattr(few, name) for name in operation.trained], grad_output)
    truths = torch.autograd.grad(truth, [getattr(doubles, name) for name in operation.trained], grad_output.double())
    for name, gradient, true in zip(operation.trained, gradients, truths, strict=True):
        errors[f"grad_{name}"] = relative_error(gradient, true)
    return errors


def is_right(errors: dict[str, float], provider: str, dtype: torch.dtype) -> bool:
    """False where NaN, too."""
    of_output = LARGEST_ERROR if provider == OWN else LARGEST_ERROR_OF_PEERS
    limits = {name: (of_output if name == "output" else LARGEST_ERROR_OF_GRADIENTS)[dtype] for name in errors}
    return all(errors[name] <= limits[name] for name in errors)


def measure(contestant: Contestant, size: Size, session: Session) -> Iterator[Record]:
    """One record a mode and state of the cache."""
    operation, step = OPERATIONS[contestant.operation], contestant.make()
    tensors, facts = make_tensors(size, session.clock.device), facts_of(contestant, size)
    errors = verify(contestant, step, tensors)
    if not is_right(errors, contestant.provider, size.dtype):
        yield facts | {"failed": f"wrong results, not timed: relative errors {errors}"}
        return

    # Forward as a predictor runs it, without a graph of gradients; backward alone.
    modes: dict[str, Callable[[], object]] = {"forward": lambda: step(tensors)}
    if size.batch <= LARGEST_BACKWARD:
        leaves = with_gradients(tensors, operation.trained)
        output = step(leaves)
        grad_output, wanted = torch.randn_like(output), [getattr(leaves, name) for name in operation.trained]
        modes["backward"] = lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)
    for mode, call in modes.items():
        yield from session.records_of(
            facts | {"mode": mode},
            call,
            errors,
            ideal_bytes=operation.maps[mode] * size.map_bytes,
            flops=operation.flops(size) * (1 if mode == "forward" else BACKWARD_FLOPS),
            graph=mode == "forward" and size.batch == 1,
        )


def facts_of(contestant: Contestant, size: Size) -> Record:
    return {"operation": contestant.operation, "provider": contestant.provider} | size.facts


def jobs(session: Session) -> Iterator[Job]:
    for place, size in enumerate(TINY if session.tiny else SIZES):
        for contestant in contestants(with_compile=place < COMPILED_SIZES and session.on_cuda):
            yield (
                facts_of(contestant, size),
                lambda contestant=contestant, size=size: measure(contestant, size, session),
            )


if __name__ == "__main__":
    run_benchmark(__doc__, 80.0, jobs, (OWN,))
