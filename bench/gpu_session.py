"""What the GPU benchmarks share: their command line, the ceilings of the run, and the records of one call."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tables import ceilings, figures_table
from timing import Clock, copy_bandwidth, machine, matmul_rate
from torch import Tensor

Record = dict[str, object]
Job = tuple[Record, Callable[[], Iterator[Record]]]  # what is measured, and its measurement

LARGEST_ERROR_OF_REPLAY = 2e-2  # in half types a graph may take matrix products of another order of summation


@dataclass(frozen=True)
class Session:
    """One run of a benchmark on one device.

    deadline: by ``time.monotonic``; no new measurement begins after it. tiny: sizes for a rehearsal.
    copy: bytes a second that a large copy reads and writes. matmul: FLOP a second of a large bfloat16 product.
    """

    clock: Clock
    deadline: float
    tiny: bool
    copy: float
    matmul: float

    @property
    def on_cuda(self) -> bool:
        return self.clock.device.type == "cuda"

    def records_of(
        self,
        facts: Record,
        call: Callable[[], object],
        errors: dict[str, float],
        *,
        ideal_bytes: float | None = None,
        flops: float | None = None,
        graph: bool = False,
    ) -> Iterator[Record]:
        """One record a state of the cache; ``graph``: also as one CUDA graph, or the reason why it was not captured.

        Peak memory and ``errors`` stand in the cold record. ``facts["host_work"]`` says that the host decides the time.
        """
        for cache in ("cold", "warm", "graph") if graph and self.on_cuda else ("cold", "warm"):
            record, timed = facts | {"cache": cache}, call
            if cache == "graph":
                record |= {"host_work": False}
                try:
                    timed = captured(call)
                except Exception as error:  # whatever in the call a graph cannot hold: the other figures stand
                    yield record | {"skipped": f"not captured: {reason(error)}"}
                    continue
            sample = self.clock.time(timed, warm=cache != "cold", seconds=0.15, most=60)
            record |= {"microseconds": asdict(sample)}
            if ideal_bytes is not None:
                rate = ideal_bytes / (sample.median * 1e-6)
                record |= {"ideal_bytes": ideal_bytes, "ideal_gb_per_s": rate / 1e9}
                record |= {"percent_of_copy": 100 * rate / self.copy}
            if flops is not None:
                record |= {"flops": flops, "percent_of_matmul": 100 * flops / (sample.median * 1e-6) / self.matmul}
            if cache == "cold":
                record |= {"peak_bytes": self.clock.peak_bytes(call), "relative_errors": errors}
            yield record

    def run(self, jobs: Iterable[Job]) -> list[Record]:
        """All records; of a job that fails or has no time left, one that says so."""
        records: list[Record] = []
        for facts, measure in jobs:
            if time.monotonic() > self.deadline:
                records.append(facts | {"skipped": "out of time"})
                continue
            try:
                records += measure()
            except Exception as error:  # a compiler's, too: one contestant's failure must not cost the others' figures
                records.append(facts | {"failed": reason(error)})
            if self.on_cuda:
                torch.cuda.empty_cache()
        return records


def captured(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Callable[[], object]:
    """The same work replayed as one CUDA graph: launch times, which rule where prompts are few, stay out of it.

    Raises:
        RuntimeError: ``call`` cannot be captured, or a replay gives other results than the call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and loaded before, not while, a graph is captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    truths = results_of(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = results_of(call)
    for result in replayed:
        result.fill_(torch.nan)
    graph.replay()
    errors = [relative_error(result, truth.double()) for result, truth in zip(replayed, truths, strict=True)]
    if not all(error < LARGEST_ERROR_OF_REPLAY for error in errors):  # also where NaN
        raise RuntimeError(f"a replay gives other results than the call: relative errors {errors}")
    return graph.replay


def results_of(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    results = call()
    return (results,) if isinstance(results, Tensor) else results


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Of the norm of the truth."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


def poison(tensors: Iterable[Tensor]) -> None:
    """Fill as much memory with NaN, and free it: nothing right is left by chance where results are likely to lie."""
    filled = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    del filled


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_benchmark(
    documentation: str, seconds: float, jobs: Callable[[Session], Iterator[Job]], own: tuple[str, ...]
) -> None:
    """The main function of a GPU benchmark; exits with 1 where a provider of ``own`` failed."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=seconds, help="no new measurement begins after this time")
    parser.add_argument("--output", type=Path, help="JSON with every figure")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal; the figures mean nothing")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    clock = Clock(torch.device(options.device))
    session = Session(clock, deadline, options.tiny, copy_bandwidth(clock), matmul_rate(clock))
    records = session.run(jobs(session))
    result: Record = {"machine": machine(clock.device), "copy_gb_per_s": session.copy / 1e9}
    result |= {"matmul_tflop_per_s": session.matmul / 1e12, "records": records}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}\n{ceilings(result)}\n\n{figures_table(records)}")
    if any(record["provider"] in own and "failed" in record for record in records):
        raise SystemExit("this project's own kernels failed")
