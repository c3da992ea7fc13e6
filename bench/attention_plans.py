"""Checks and times other block sizes of Triton's attention on the GPU at hand, for question 8 of bench/QUEUE.md.

    python bench/attention_plans.py [--dtype bfloat16] [--rows 56] [--prompts 64] [--check-only]

A line for each plan of the forward and of the backward's two kernels: the largest error of a result against float64,
relative in the norm, and the time of the whole call. A plan that is wrong gets no time. Many processes check sooner
than one, since compiling takes most of it: --share 3/8 takes every eighth plan, from the third on.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from timing import relative_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from attention_cases import AttentionCase, attention_truth, make_attention_inputs
from stable_sam_cuda.kernels.attention import backward, forward
from stable_sam_cuda.kernels.attention.plan import BACKWARD_TILE, AttentionPlan

OPERATIONS = torch.ops.stable_sam_cuda
LARGEST_ERROR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EVERY, TRAINED = 0b111111, 0b011111  # the positional encoding learns nothing


def plan(rows: int, chunk: int, tile: tuple[int, int], warps: int, resident: int, **rest: Any) -> AttentionPlan:
    return AttentionPlan(rows, chunk, tile, warps, resident, shared_bytes=0, **rest)


def forward_candidates(dtype: torch.dtype, rows: int) -> list[AttentionPlan]:
    if dtype == torch.float32:
        sizes = ((64, (4, 4), 8), (64, (4, 8), 8), (32, (4, 4), 8), (32, (4, 4), 4))
        return [plan(rows, 32, tile, warps, 1, precision="tf32x3") for rows, tile, warps in sizes]
    if rows > 64:
        large = [plan(128, 32, tile, 8, 1, offsets_ahead=ahead) for tile in ((4, 8), (4, 4)) for ahead in (True, False)]
        return [*large, plan(64, 32, (4, 8), 8, 2, registers=128)]
    tiles, both = ((4, 8), (4, 4), (2, 8)), (False, True)
    eight = [plan(64, 32, tile, 8, 2, registers=128, offsets_ahead=ahead) for tile in tiles for ahead in both]
    four = [plan(64, 32, tile, 4, 2, offsets_ahead=ahead) for tile in tiles[:2] for ahead in both]
    return [*eight, plan(64, 16, (4, 8), 8, 2, registers=128), plan(64, 32, (4, 8), 8, 1, offsets_ahead=True), *four]


def tiles_candidates(dtype: torch.dtype) -> list[AttentionPlan]:
    if dtype == torch.float32:
        sizes = ((16, 64, 8, "tf32x3"), (16, 32, 8, "tf32x3"), (16, 64, 8, "ieee"))
        return [plan(rows, chunk, BACKWARD_TILE, warps, 1, precision=kind) for rows, chunk, warps, kind in sizes]
    sizes = ((64, 64, 8, 1), (64, 128, 8, 1), (64, 32, 8, 1), (64, 64, 4, 1), (32, 64, 4, 3), (32, 64, 8, 3))
    return [plan(rows, chunk, BACKWARD_TILE, warps, resident) for rows, chunk, warps, resident in sizes]


def rows_candidates(dtype: torch.dtype, rows: int) -> list[AttentionPlan]:
    if dtype == torch.float32:
        sizes, precision = ((64, 32, 8, 1), (64, 32, 4, 1), (32, 32, 8, 1)), "tf32x3"
    else:
        sizes, precision = ((64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 4, 2), (64, 16, 8, 2)), "tf32"
        sizes = (*sizes, (128, 32, 8, 1)) if rows > 64 else sizes
    return [plan(r, chunk, BACKWARD_TILE, warps, resident, precision=precision) for r, chunk, warps, resident in sizes]


@contextlib.contextmanager
def only(module: ModuleType, ladder: str, candidate: AttentionPlan) -> Iterator[None]:
    """The kernels of ``module`` take this plan and no other."""
    real = getattr(module, ladder)
    setattr(module, ladder, lambda *sizes: [candidate])
    try:
        yield
    finally:
        setattr(module, ladder, real)


def checked_calls(case: AttentionCase, dtype: torch.dtype, device: str) -> dict[str, Callable[[], float]]:
    """The largest error of the forward's results, and of the backward's."""
    inputs, grad_pooled = make_attention_inputs(case, dtype, device)
    pooled, logsumexp, gradients = attention_truth(inputs, case.max_offset, grad_pooled)
    arguments = (*inputs.values(), case.max_offset)

    def run_forward() -> float:
        found = OPERATIONS.sampled_attention_triton(*arguments)
        return max(relative_error(one, other) for one, other in zip(found, (pooled, logsumexp), strict=True))

    def run_backward() -> float:
        saved = (pooled.to(dtype), logsumexp.float())
        found = OPERATIONS.sampled_attention_triton_backward(
            grad_pooled, *inputs.values(), *saved, case.max_offset, EVERY
        )
        # Of the sampling's own gradients a few lie within rounding of an integer location.
        pairs = {name: pair for name, *pair in zip(gradients, found, gradients.values(), strict=True)}
        return max(relative_error(*pair) for name, pair in pairs.items() if name not in ("offsets", "alpha"))

    return {"forward": run_forward, "backward": run_backward}


def timed_calls(prompts: int, rows: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def image(batch: int) -> torch.Tensor:
        return normal(batch, 64, 64, 256).permute(0, 3, 1, 2)

    query_rows, grad_pooled = normal(prompts, rows, 256) / 16, normal(prompts, rows, 256)
    maps = (image(prompts), image(prompts), normal(prompts, 2, 64, 64), normal(prompts, 2), image(1))
    arguments = (query_rows, *maps, 1.5)
    saved = OPERATIONS.sampled_attention_triton(*arguments)
    run_backward = OPERATIONS.sampled_attention_triton_backward
    return {
        "forward": lambda: OPERATIONS.sampled_attention_triton(*arguments),
        "backward": lambda: run_backward(grad_pooled, *arguments[:-1], *saved, 1.5, TRAINED),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=56)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--share", default="0/1", metavar="I/N")
    parser.add_argument("--tiny", action="store_true", help="for a rehearsal: a map of 5 x 6, 32 channels")
    options = parser.parse_args()
    dtype, rows = getattr(torch, options.dtype), options.rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    share, shares = map(int, options.share.split("/"))
    jobs = [
        *(("forward", forward, "forward_plans", one) for one in forward_candidates(dtype, rows)),
        *(("backward", backward, "tiles_plans", one) for one in tiles_candidates(dtype)),
        *(("backward", backward, "rows_plans", one) for one in rows_candidates(dtype, rows)),
    ]
    sizes = {"channels": 32, "height": 5, "width": 6} if options.tiny else {"channels": 256, "height": 64, "width": 64}
    checks = checked_calls(AttentionCase("plans", 2, rows, **sizes), dtype, device)
    times = {} if options.check_only else timed_calls(options.prompts, rows, dtype, device)
    for direction, module, ladder, candidate in jobs[share::shares]:
        with only(module, ladder, candidate):
            error = checks[direction]()
            line = f"{options.dtype}, {rows} rows, {ladder}: {candidate}: error {error:.1e}"
            if not error <= LARGEST_ERROR[dtype]:
                line += ", WRONG"
            elif direction in times:
                median = triton.testing.do_bench(times[direction], warmup=20, rep=60, return_mode="median")
                line += f", {1e3 * median:.0f} us"
        print(line, flush=True)


if __name__ == "__main__":
    main()
