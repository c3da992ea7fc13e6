"""Times deformable_sample, forward and backward, against what PyTorch offers, verified first.

    python bench/gpu_sampler.py [--device cuda] [--seconds 120] [--output FILE.json] [--tiny]

Sizes are SAM's: C = 256, 64 x 64. The most telling sizes come first; what the time does not allow is listed as
skipped. Ideal bytes: each input read and each result written once, 3 maps forward and 5 backward. Percentages are of a
large copy's bandwidth and of a large bfloat16 matrix product's rate in the same run.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from gpu_session import Job, Record, Session, dtype_name, poison, relative_error, run_benchmark
from sampler_providers import Sampler, own, peers
from torch import Tensor

from stable_sam_cuda.ops import reference

MAX_OFFSET = 2.0
COMPILED_SIZES = 3
IDEAL_MAPS = {"forward": 3, "backward": 5}
# An element: 4 taps and a blend; their gradients by taps, locations, shares and identity. Locations are not counted.
FLOPS = {"forward": 10, "backward": 25}
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
    def map_elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    @property
    def map_bytes(self) -> int:
        return self.map_elements * self.dtype.itemsize


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


def verify(sampler: Sampler, inputs: list[Tensor], grad_output: Tensor) -> dict[str, float]:
    """Relative errors of output and gradients on the first two prompts, against the reference in float64.

    The offsets' gradient jumps at integer locations, where rounding decides; it is not judged here but by the tests.
    """
    inputs, grad_output = [tensor[:2].detach().requires_grad_() for tensor in inputs], grad_output[:2]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    true_output = reference.deformable_sample(*doubles, None, MAX_OFFSET)
    true_gradients = torch.autograd.grad(true_output, doubles, grad_output.double())
    poison(inputs)
    output = sampler(*inputs, MAX_OFFSET)
    gradients = torch.autograd.grad(output, inputs, grad_output)
    errors = {"output": relative_error(output, true_output)}
    for name, gradient, truth in zip(
        ("features", "offsets", "identity", "alpha"), gradients, true_gradients, strict=True
    ):
        if name != "offsets":
            errors[f"grad_{name}"] = relative_error(gradient, truth)
    return errors


def measure(provider: str, sampler: Sampler, size: Size, session: Session) -> Iterator[Record]:
    """One record a mode and state of the cache."""
    inputs, grad_output = make_inputs(size, session.clock.device)
    facts = facts_of(provider, size)
    errors = verify(sampler, inputs, grad_output)
    limit = (LARGEST_ERROR if provider in OWN else LARGEST_ERROR_OF_PEERS)[size.dtype]
    if not all(error <= limit for error in errors.values()):  # also where NaN
        yield facts | {"failed": f"wrong results, not timed: relative errors {errors}"}
        return

    plain = [tensor.detach() for tensor in inputs]
    output = sampler(*inputs, MAX_OFFSET)
    modes: dict[str, Callable[[], object]] = {
        "forward": lambda: sampler(*plain, MAX_OFFSET),
        "backward": lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True),
    }
    for mode, call in modes.items():
        yield from session.records_of(
            facts | {"mode": mode},
            call,
            errors,
            ideal_bytes=IDEAL_MAPS[mode] * size.map_bytes,
            flops=FLOPS[mode] * size.map_elements,
            graph=mode == "forward" and size.batch == 1,
        )


def facts_of(provider: str, size: Size) -> Record:
    facts: Record = {"operation": "deformable_sample", "provider": provider, "dtype": dtype_name(size.dtype)}
    return facts | {"B": size.batch, "C": size.channels, "H": size.height, "W": size.width, "max_offset": MAX_OFFSET}


def jobs(session: Session) -> Iterator[Job]:
    for place, size in enumerate(TINY if session.tiny else SIZES):
        # Compiling takes most of the time: only where the targets ask for it.
        makers: dict[str, Callable[[], Sampler]] = {
            name: (lambda sampler=sampler: sampler) for name, sampler in own(session.clock.device).items()
        } | peers(with_compile=place < COMPILED_SIZES and session.on_cuda)
        for provider, make in makers.items():
            yield (
                facts_of(provider, size),
                lambda provider=provider, make=make, size=size: measure(provider, make(), size, session),
            )


if __name__ == "__main__":
    run_benchmark(__doc__, 120.0, jobs, OWN)
