"""Times the plugin with its attention against eager PyTorch, torch.compile and plain SAM's attention, verified first.

    python bench/gpu_attention.py [--device cuda] [--seconds 80] [--output FILE.json] [--tiny]

"layer" is projection, offset head, sampling and attention; "plain" SAM's attention without any plugin; "offset_head"
and "attention" the two steps alone. The most telling sizes come first; what the time does not allow is listed as
skipped. Percentages are of a large copy's bandwidth in the same run, on the fewest maps that each has to move.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from attention_providers import OPERATIONS, OWN, Contestant, Step, contestants
from attention_shapes import SIZES, TINY, LayerTensors, Size, make_tensors
from gpu_sampler import relative_error
from tables import attention_table
from timing import Clock, copy_bandwidth, machine

# Of the norm of the truth. Half types round x* and the offsets, and grid_sample wants its grid in the features' dtype,
# a tenth of a pixel in bfloat16. Gradients by offsets jump where rounding moves a location past an integer.
LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LARGEST_ERROR_OF_PEERS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.4}
LARGEST_ERROR_OF_GRADIENTS = {torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.5}
LARGEST_BACKWARD = 64  # prompts: eager PyTorch keeps some twenty maps of each
COMPILED_SIZES = 2  # compiling takes most of the time


def with_gradients(tensors: LayerTensors, names: tuple[str, ...]) -> LayerTensors:
    """Fresh leaves of these names."""
    return tensors._replace(**{name: getattr(tensors, name).detach().requires_grad_() for name in names})


def verify(contestant: Contestant, step: Step, tensors: LayerTensors) -> dict[str, float]:
    """Relative errors on the first two prompts, against the reference in float64."""
    operation = OPERATIONS[contestant.operation]
    few = with_gradients(tensors.first_prompts(2), operation.trained)
    doubles = with_gradients(few.double(), operation.trained)
    truth = operation.truth(doubles)
    # Freed again, this memory is what results are likely to come to lie in: nothing right is left there by chance.
    poison = [torch.full_like(tensor, torch.nan) for tensor in few]
    del poison
    output = step(few)
    errors = {"output": relative_error(output, truth)}
    if operation.trained:
        grad_output = torch.randn_like(output)
        gradients = torch.autograd.grad(output, [getattr(few, name) for name in operation.trained], grad_output)
        truths = torch.autograd.grad(
            truth, [getattr(doubles, name) for name in operation.trained], grad_output.double()
        )
        for name, gradient, true in zip(operation.trained, gradients, truths, strict=True):
            errors[f"grad_{name}"] = relative_error(gradient, true)
    return errors


def is_right(errors: dict[str, float], provider: str, dtype: torch.dtype) -> bool:
    """False where NaN, too."""
    of_output = LARGEST_ERROR if provider == OWN else LARGEST_ERROR_OF_PEERS
    limits = {name: (of_output if name == "output" else LARGEST_ERROR_OF_GRADIENTS)[dtype] for name in errors}
    return all(errors[name] <= limits[name] for name in errors)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The same work replayed as one CUDA graph: launch times, which rule where prompts are few, stay out of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(contestant: Contestant, size: Size, clock: Clock, copy: float) -> Iterator[dict[str, object]]:
    """One record a mode and state of the cache; ``copy`` in bytes a second."""
    operation, step, tensors = OPERATIONS[contestant.operation], contestant.make(), make_tensors(size, clock.device)
    facts = {"operation": contestant.operation, "provider": contestant.provider} | size.facts
    errors = verify(contestant, step, tensors)
    if not is_right(errors, contestant.provider, size.dtype):
        yield facts | {"failed": f"wrong results, not timed: relative errors {errors}"}
        return

    # Forward as a predictor runs it, without a graph of gradients; backward alone.
    modes: dict[str, Callable[[], object]] = {"forward": lambda: step(tensors)}
    if operation.trained and size.batch <= LARGEST_BACKWARD:
        leaves = with_gradients(tensors, operation.trained)
        output = step(leaves)
        grad_output, wanted = torch.randn_like(output), [getattr(leaves, name) for name in operation.trained]
        modes["backward"] = lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)
    for mode, call in modes.items():
        ideal = operation.maps[mode] * size.map_bytes
        timed = {"cold": call, "warm": call}
        if mode == "forward" and size.batch == 1 and clock.device.type == "cuda":
            timed["graph"] = captured(call)
        for cache, timed_call in timed.items():
            sample = clock.time(timed_call, warm=cache != "cold", seconds=0.15, most=60)
            rate = ideal / (sample.median * 1e-6)
            record = facts | {"mode": mode, "cache": cache, "microseconds": asdict(sample)}
            record |= {"ideal_gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy}
            if cache == "cold":
                record |= {"peak_bytes": clock.peak_bytes(call), "relative_errors": errors}
            yield record


def run(sizes: list[Size], clock: Clock, deadline: float, copy: float) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for place, size in enumerate(sizes):
        for contestant in contestants(with_compile=place < COMPILED_SIZES and clock.device.type == "cuda"):
            facts = {"operation": contestant.operation, "provider": contestant.provider} | size.facts
            if time.monotonic() > deadline:
                records.append(facts | {"skipped": "out of time"})
                continue
            try:
                records += measure(contestant, size, clock, copy)
            except Exception as error:  # a compiler's, too: one contestant's failure must not cost the others' figures
                records.append(facts | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=80.0, help="no new measurement begins after this time")
    parser.add_argument("--output", type=Path, help="JSON with every figure")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal; the figures mean nothing")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    clock = Clock(torch.device(options.device))
    copy = copy_bandwidth(clock)
    records = run(TINY if options.tiny else SIZES, clock, deadline, copy)
    result = {"machine": machine(clock.device), "copy_gb_per_s": copy / 1e9, "records": records}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}\ncopy: {copy / 1e9:.1f} GB/s, read and written\n\n{attention_table(records)}")
    if any(record["provider"] == OWN and "failed" in record for record in records):
        raise SystemExit("this project's own kernels failed")


if __name__ == "__main__":
    main()
