"""Plugin and attention on the CPU: fused, as an eager chain, and SAM's attention without any plugin.

    python bench/cpu_attention.py [--batches 1 16] [--rounds 9] [--threads 2] [--tokens 8]

Sizes are SAM's: 256 channels, 64 x 64 pixels, 8 heads of 16. Contestants, each with offsets given and with the offset
network's head before it (depthwise convolution, norm, GELU, projection):
    fused         stable_sam_cuda.deformable_attention
    eager         grid_sample, blend, key and value projections of every pixel, attention
    plain SAM     segment_anything's Attention on keys + key_pe and keys, materialised for each prompt as SAM does

All are verified against the reference in float64 first. They are timed in turns, so a disturbance hits all of them, and
the figure that counts is the ratio. Peak memory (Linux) is what one call adds to the resident size of a process of its
own, in which malloc gives back what is freed. Results: bench/results/cpu/attention-<date>-<commit>.json.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sampler_providers import eager as eager_sample
from segment_anything.modeling.transformer import Attention
from shapes import SamplerShape, channels_last
from timing import Sample, machine
from torch import Tensor, nn
from torch.nn import functional as F
from turns import cpu_facts, write_record

import stable_sam_cuda

HEADS, INNER, KERNEL_SIZE = 8, 128, 5
FUSED, EAGER, PLAIN = "fused", "eager", "plain SAM"
WITH_HEAD = " + offset head"
# At the largest batch: how many times faster than eager, and at most how much of plain SAM's time.
LEAST_OF_EAGER, MOST_OF_PLAIN = 3.0, 1.2


class Inputs:
    """Random inputs of one size; the memory layout is channels-last, SAM's own, but for eager's grid_sample."""

    def __init__(self, batch: int, tokens: int) -> None:
        self.shape = SamplerShape(batch)
        generator = torch.Generator().manual_seed(2)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator)

        channels, height, width = self.shape.channels, self.shape.height, self.shape.width
        self.nchw = self.shape.inputs()
        self.features, self.offsets, self.identity, self.alpha = channels_last(self.nchw)
        self.queries = normal(batch, tokens, channels)
        self.key_pe = normal(1, channels, height, width).contiguous(memory_format=torch.channels_last)
        torch.manual_seed(3)
        self.attention = Attention(channels, HEADS, downsample_rate=channels // INNER).requires_grad_(False)
        size = KERNEL_SIZE
        self.head = {
            "depthwise_weight": normal(channels, 1, size, size) / size,
            "depthwise_bias": normal(channels),
            "norm_weight": normal(channels),
            "norm_bias": normal(channels),
            "pointwise_weight": normal(2, channels, 1, 1) / channels**0.5,
            "pointwise_bias": normal(2),
        }

    def weights(self) -> dict[str, Tensor]:
        return {
            f"{name}_{kind}": getattr(getattr(self.attention, f"{name}_proj"), kind)
            for name in ("q", "k", "v", "out")
            for kind in ("weight", "bias")
        }


def pixels(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return image.flatten(2).transpose(1, 2)


def fused(inputs: Inputs, offsets: Tensor, backend: str = "cpu") -> Tensor:
    return stable_sam_cuda.deformable_attention(
        inputs.queries,
        inputs.features,
        inputs.identity,
        offsets,
        inputs.alpha,
        inputs.key_pe,
        **inputs.weights(),
        num_heads=HEADS,
        max_offset=inputs.shape.max_offset,
        backend=backend,
    )


def fused_with_head(inputs: Inputs) -> Tensor:
    return fused(inputs, stable_sam_cuda.offset_head(inputs.features, **inputs.head, backend="cpu"))


def eager(inputs: Inputs, offsets: Tensor) -> Tensor:
    features, _, identity, alpha = inputs.nchw
    calibrated = pixels(eager_sample(features, offsets, identity, alpha, inputs.shape.max_offset))
    return inputs.attention(q=inputs.queries, k=calibrated + pixels(inputs.key_pe), v=calibrated)


def eager_with_head(inputs: Inputs) -> Tensor:
    head = inputs.head
    features, channels = inputs.nchw[0], inputs.shape.channels
    hidden = F.conv2d(
        features, head["depthwise_weight"], head["depthwise_bias"], padding=KERNEL_SIZE // 2, groups=channels
    ).permute(0, 2, 3, 1)
    hidden = F.gelu(F.layer_norm(hidden, (channels,), head["norm_weight"], head["norm_bias"], 1e-6))
    raw = F.linear(hidden, head["pointwise_weight"].flatten(1), head["pointwise_bias"])
    return eager(inputs, raw.permute(0, 3, 1, 2))


def plain(inputs: Inputs) -> Tensor:
    keys = pixels(inputs.identity)
    return inputs.attention(q=inputs.queries, k=keys + pixels(inputs.key_pe), v=keys)


CONTESTANTS: dict[str, Callable[[Inputs], Tensor]] = {
    FUSED: lambda inputs: fused(inputs, inputs.offsets),
    EAGER: lambda inputs: eager(inputs, inputs.offsets),
    FUSED + WITH_HEAD: fused_with_head,
    EAGER + WITH_HEAD: eager_with_head,
    PLAIN: plain,
}


def in_double(inputs: Inputs) -> Inputs:
    doubled = Inputs(inputs.shape.batch, inputs.queries.shape[1])
    for name, value in vars(doubled).items():
        if isinstance(value, (Tensor, nn.Module)):
            setattr(doubled, name, value.double())
    doubled.head = {name: tensor.double() for name, tensor in doubled.head.items()}
    return doubled


def verify(inputs: Inputs) -> dict[str, float]:
    """Largest error against the reference in float64, over the truth's root mean square."""
    exact = in_double(inputs)
    raw = stable_sam_cuda.offset_head(exact.features, **exact.head, backend="reference")
    truths = {FUSED: fused(exact, exact.offsets, "reference"), FUSED + WITH_HEAD: fused(exact, raw, "reference")}
    truths |= {EAGER: truths[FUSED], EAGER + WITH_HEAD: truths[FUSED + WITH_HEAD], PLAIN: plain(exact)}
    errors = {}
    for name, run in CONTESTANTS.items():
        truth = truths[name]
        errors[name] = ((run(inputs).double() - truth).abs().max() / truth.square().mean().sqrt()).item()
        if not errors[name] < 1e-3:
            raise SystemExit(f"{name} is wrong at {inputs.shape}: error {errors[name]}")
    return errors


def time_in_turns(inputs: Inputs, rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds a call, of every round: the mean over the timed calls of a turn."""
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, run in CONTESTANTS.items():
            run(inputs)
            start = time.perf_counter()
            for _ in range(calls):
                run(inputs)
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return times


def resident_bytes(field: str) -> int:
    """VmRSS, the resident size, or VmHWM, the highest since it was reset."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def peak_bytes_of_call(name: str, batch: int, tokens: int) -> int:
    """In this process, which must be fresh."""
    inputs = Inputs(batch, tokens)
    CONTESTANTS[name](Inputs(1, tokens))  # libraries and threads come first
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_bytes("VmRSS")
    CONTESTANTS[name](inputs)
    return resident_bytes("VmHWM") - before


def peak_bytes(name: str, batch: int, options: argparse.Namespace) -> int | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    arguments = ["--peak-of", name, "--batches", batch, "--tokens", options.tokens, "--threads", options.threads]
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, help="JSON file, in place of bench/results/cpu/attention-<date>-<commit>.json"
    )
    parser.add_argument("--peak-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.peak_of:
        print(peak_bytes_of_call(options.peak_of, options.batches[0], options.tokens))
        return

    record: dict[str, object] = {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%MZ}"}
    record |= {**machine(torch.device("cpu")), **cpu_facts(), "results": []}
    for batch in options.batches:
        inputs = Inputs(batch, options.tokens)
        errors = verify(inputs)
        peaks = {name: peak_bytes(name, batch, options) for name in CONTESTANTS}
        calls = max(1, 8 // batch)
        times = time_in_turns(inputs, options.rounds, calls)
        print(f"\n{inputs.shape} T={options.tokens}, {options.threads} threads, {options.rounds} rounds of {calls}")
        for name, milliseconds in times.items():
            sample = Sample.of(milliseconds)
            ratio = median_ratio(milliseconds, times[FUSED])
            record["results"].append(
                {
                    "shape": str(inputs.shape),
                    "tokens": options.tokens,
                    "contestant": name,
                    "median_ms": sample.median,
                    "p20_ms": sample.p20,
                    "p80_ms": sample.p80,
                    "rounds": sample.runs,
                    "times_slower_than_fused": ratio,
                    "peak_bytes": peaks[name],
                    "error": errors[name],
                }
            )
            spread = f"p20 {sample.p20:.2f}, p80 {sample.p80:.2f}"
            peak = "" if peaks[name] is None else f", {peaks[name] / 2**20:7.1f} MiB"
            print(f"  {name:22} {sample.median:9.2f} ms  ({spread})  {ratio:5.2f} x fused{peak}")
        for extra in ("", WITH_HEAD):
            of_eager = median_ratio(times[EAGER + extra], times[FUSED + extra])
            of_plain = median_ratio(times[FUSED + extra], times[PLAIN])
            print(f"  fused{extra}: {of_eager:.2f} x as fast as eager, {of_plain:.2f} x plain SAM's time")
            if extra == "" and batch == 16:
                passed = of_eager >= LEAST_OF_EAGER and of_plain <= MOST_OF_PLAIN
                print(f"  target {LEAST_OF_EAGER:g} x, {MOST_OF_PLAIN:g} x: {'passed' if passed else 'MISSED'}")
    write_record(record, options.out, before="attention-")


def median_ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


if __name__ == "__main__":
    main()
