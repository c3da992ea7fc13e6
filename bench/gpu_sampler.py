"""Times deformable_sample, forward and backward, against what PyTorch offers, verified first.

    python bench/gpu_sampler.py [--device cuda] [--seconds 120] [--output FILE.json] [--tiny]

Sizes are SAM's: C = 256, 64 x 64. The most telling sizes come first; what the time does not allow is listed as
skipped. Ideal bytes: each input read and each result written once, 3 maps forward and 5 backward.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from sampler_providers import Sampler, own, peers
from tables import sampler_table
from timing import Clock, copy_bandwidth, machine
from torch import Tensor

from stable_sam_cuda.ops import reference

MAX_OFFSET = 2.0
IDEAL_MAPS = {"forward": 3, "backward": 5}
OWN = ("cuda", "triton", "cpu")
# Relative to the norm of the truth: what rounding the result to the dtype allows this project's kernels, and what
# rounding coordinates to it allows the others (a bfloat16 grid is off by a tenth of a pixel at 64).
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LARGEST_ERROR_OF_PEERS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.4}


class Size(NamedTuple):
    dtype: torch.dtype
    batch: int
    channels: int = 256
    height: int = 64
    width: int = 64

    @property
    def map_bytes(self) -> int:
        return self.batch * self.channels * self.height * self.width * self.dtype.itemsize


SIZES = [
    Size(torch.bfloat16, 64),
    Size(torch.float32, 64),
    Size(torch.bfloat16, 1),
    Size(torch.bfloat16, 16),
    Size(torch.bfloat16, 256),
    Size(torch.float16, 64),
    Size(torch.float32, 1),
    Size(torch.float32, 16),
    Size(torch.float32, 256),
    Size(torch.float16, 1),
    Size(torch.float16, 16),
    Size(torch.float16, 256),
]
TINY = [Size(torch.float32, 2, 16, 9, 8), Size(torch.bfloat16, 2, 16, 9, 8)]


def make_inputs(size: Size, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Features, offsets, identity, alpha; and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device=device, generator=generator).to(size.dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    image = (size.batch, size.channels, size.height, size.width)
    inputs = [normal(*image), normal(size.batch, 2, *image[2:]), normal(*image), normal(size.batch, 2)]
    return [tensor.requires_grad_() for tensor in inputs], normal(*image)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


def verify(sampler: Sampler, inputs: list[Tensor], grad_output: Tensor) -> dict[str, float]:
    """Relative errors of output and gradients on the first two prompts, against the reference in float64.

    The offsets' gradient jumps at integer locations, where rounding decides; it is not judged here but by the tests.
    """
    inputs, grad_output = [tensor[:2].detach().requires_grad_() for tensor in inputs], grad_output[:2]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    true_output = reference.deformable_sample(*doubles, None, MAX_OFFSET)
    true_gradients = torch.autograd.grad(true_output, doubles, grad_output.double())
    # Freed again, this memory is what results are likely to come to lie in: nothing right is left there by chance.
    poison = [torch.full_like(tensor, torch.nan) for tensor in inputs]
    del poison
    output = sampler(*inputs, MAX_OFFSET)
    gradients = torch.autograd.grad(output, inputs, grad_output)
    errors = {"output": relative_error(output, true_output)}
    for name, gradient, truth in zip(
        ("features", "offsets", "identity", "alpha"), gradients, true_gradients, strict=True
    ):
        if name != "offsets":
            errors[f"grad_{name}"] = relative_error(gradient, truth)
    return errors


def measure(provider: str, sampler: Sampler, size: Size, clock: Clock, copy: float) -> Iterator[dict[str, object]]:
    """One record a mode; ``copy`` in bytes a second."""
    inputs, grad_output = make_inputs(size, clock.device)
    facts = {"operation": "deformable_sample", "provider": provider, "dtype": str(size.dtype).removeprefix("torch.")}
    facts |= {"B": size.batch, "C": size.channels, "H": size.height, "W": size.width, "max_offset": MAX_OFFSET}
    errors = verify(sampler, inputs, grad_output)
    worst = max(errors.values())
    limit = (LARGEST_ERROR if provider in OWN else LARGEST_ERROR_OF_PEERS)[size.dtype]
    if not worst <= limit:  # also where NaN
        yield facts | {"failed": f"wrong results, not timed: relative errors {errors}"}
        return

    plain = [tensor.detach() for tensor in inputs]
    output = sampler(*inputs, MAX_OFFSET)
    modes: dict[str, Callable[[], object]] = {
        "forward": lambda: sampler(*plain, MAX_OFFSET),
        "backward": lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True),
    }
    for mode, call in modes.items():
        ideal = IDEAL_MAPS[mode] * size.map_bytes
        for warm in (False, True):
            sample = clock.time(call, warm=warm)
            rate = ideal / (sample.median * 1e-6)
            record = facts | {"mode": mode, "cache": "warm" if warm else "cold", "microseconds": asdict(sample)}
            record |= {"ideal_gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy}
            if not warm:
                record |= {"peak_bytes": clock.peak_bytes(call), "relative_error": worst}
            yield record


def run(sizes: list[Size], clock: Clock, deadline: float, copy: float) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for place, size in enumerate(sizes):
        # Compiling takes most of the time: only where the targets ask for it.
        makers: dict[str, Callable[[], Sampler]] = {
            name: (lambda sampler=sampler: sampler) for name, sampler in own(clock.device).items()
        } | peers(with_compile=place < 3 and clock.device.type == "cuda")
        for provider, make in makers.items():
            if time.monotonic() > deadline:
                records.append(
                    {"provider": provider, "dtype": str(size.dtype), "B": size.batch, "skipped": "out of time"}
                )
                continue
            try:
                records += measure(provider, make(), size, clock, copy)
            except Exception as error:  # a compiler's, too: one contestant's failure must not cost the others' figures
                facts = {"provider": provider, "dtype": str(size.dtype), "B": size.batch}
                records.append(facts | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120.0, help="no new measurement begins after this time")
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
    print(f"{result['machine']}\ncopy: {copy / 1e9:.1f} GB/s, read and written\n\n{sampler_table(records)}")
    if any(record["provider"] in OWN and "failed" in record for record in records):
        raise SystemExit("this project's own kernels failed")


if __name__ == "__main__":
    main()
