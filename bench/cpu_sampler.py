"""The CPU sampler against eager PyTorch and torch.compile: verified first, then timed in turns.

    python bench/cpu_sampler.py [--batches 1 16] [--rounds 15] [--threads 2] [--no-compile]

The figure that counts is the ratio of turns (`turns.py`). Memory is what a user has: the default allocator, fresh
outputs every call, page faults included. Outputs are NaN-filled while verifying. Results:
bench/results/cpu/<date>-<commit>.json.
"""

import argparse
import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sampler_providers import compiled_eager, eager
from shapes import SamplerShape, channels_last
from timing import machine
from torch import Tensor
from turns import cpu_facts, summary, time_in_turns, write_record

import stable_sam_cuda
from stable_sam_cuda.ops import reference

OWN = "stable_sam_cuda"
OWN_NCHW = "stable_sam_cuda, NCHW in"
# Times faster than eager that this project asks of itself, by mode and batch.
TARGETS = {("forward", 1): 12.0, ("forward", 16): 4.0, ("forward+backward", 1): 5.0, ("forward+backward", 16): 3.0}


def own(features: Tensor, offsets: Tensor, identity: Tensor, alpha: Tensor, max_offset: float) -> Tensor:
    return stable_sam_cuda.deformable_sample(
        features, offsets, identity=identity, alpha=alpha, max_offset=max_offset, backend="cpu"
    )


Contestant = tuple[Callable[..., Tensor], list[Tensor], Tensor]


def contestants(shape: SamplerShape, with_compile: bool) -> dict[str, Contestant]:
    """Function, inputs and incoming gradient of each, in the memory layout each prefers."""
    inputs, gradient = shape.inputs(), shape.grad_output()
    made: dict[str, Contestant] = {
        OWN: (own, channels_last(inputs), channels_last([gradient])[0]),
        OWN_NCHW: (own, inputs, gradient),
        "eager": (eager, inputs, gradient),
    }
    if with_compile:
        made["torch.compile"] = (compiled_eager(), inputs, gradient)
    return made


def forward(contestant: Contestant, shape: SamplerShape) -> list[Tensor]:
    function, inputs, _ = contestant
    with torch.no_grad():
        return [function(*inputs, shape.max_offset)]


def forward_backward(contestant: Contestant, shape: SamplerShape) -> list[Tensor]:
    function, inputs, gradient = contestant
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves, shape.max_offset)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


MODES = {"forward": forward, "forward+backward": forward_backward}


def verify(all_contestants: dict[str, Contestant], shape: SamplerShape) -> dict[str, list[float]]:
    """Largest error of output and gradients against the reference in float64, over the truth's root mean square."""
    inputs = [tensor.double() for tensor in shape.inputs()]

    def truth(features: Tensor, offsets: Tensor, identity: Tensor, alpha: Tensor, max_offset: float) -> Tensor:
        return reference.deformable_sample(features, offsets, identity, alpha, None, max_offset)

    exact = forward_backward((truth, inputs, shape.grad_output().double()), shape)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    errors = {}
    for name, contestant in all_contestants.items():
        got = forward_backward(contestant, shape)
        errors[name] = [
            ((g.double() - e).abs().max() / e.square().mean().sqrt()).item() for g, e in zip(got, exact, strict=True)
        ]
        # Offsets whose location rounds across an integer take the other one-sided derivative: not compared at the peak.
        worst = max(errors[name][:2] + errors[name][3:])
        if not worst < 1e-3:
            raise SystemExit(f"{name} is wrong at {shape}: errors {errors[name]}")
    torch.use_deterministic_algorithms(False)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="JSON file, in place of bench/results/cpu/<date>-<commit>.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    record: dict[str, object] = {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%MZ}"}
    record |= {**machine(torch.device("cpu")), **cpu_facts(), "results": []}
    for batch in options.batches:
        shape = SamplerShape(batch)
        all_contestants = contestants(shape, not options.no_compile)
        errors = verify(all_contestants, shape)
        for mode, run in MODES.items():
            calls = max(1, 8 // batch)
            turns = {name: partial(run, contestant, shape) for name, contestant in all_contestants.items()}
            times = time_in_turns(turns, options.rounds, calls)
            print(f"\n{mode}, {shape}, {options.rounds} rounds of {calls}")
            for name, milliseconds in times.items():
                result = summary(times[OWN], milliseconds) | {"errors": errors[name]}
                record["results"].append({"mode": mode, "shape": str(shape), "contestant": name, **result})
                spread = f"p20 {result['p20_ms']:.3f}, p80 {result['p80_ms']:.3f}"
                ratio = f"{result['times_slower_than_own']:6.2f} x ours"
                print(f"  {name:26} {result['median_ms']:9.3f} ms  ({spread})  {ratio}")
            target = TARGETS.get((mode, batch))
            if target is not None:
                reached = summary(times[OWN], times["eager"])["times_slower_than_own"]
                print(f"  target {target:g} x eager: {'passed' if reached >= target else 'MISSED'}, {reached:.2f} x")
    write_record(record, options.out)


if __name__ == "__main__":
    main()
