"""Clocks, ceilings and facts of the machine."""

import contextlib
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from stable_sam_cuda import _extension

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], object]

LARGEST_ERROR_OF_REPLAY = 2e-2  # in half types a graph may take matrix products of another order of summation
TURN = 0.1  # seconds that a turn of quick calls takes on a CPU
LONG = 0.5  # seconds of a call that one call before it warms up enough
PER_CONTESTANT = 0.15  # seconds of timing on a GPU, within the following numbers of rounds
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60


class ReplayClock:
    """A timer for pytest-benchmark that tells the times measured before, one a round."""

    def __init__(self) -> None:
        self._now, self._samples = 0.0, iter(())

    def load(self, samples: list[float]) -> None:
        self._samples = iter(samples)

    def advance(self) -> None:
        """What pytest-benchmark is told to time: one round, over at once."""
        self._now += next(self._samples)

    def now(self) -> float:
        return self._now


def time_in_turns(calls: dict[str, Call], device: torch.device, rounds: int, warm: bool) -> dict[str, list[float]]:
    """Seconds a call of every round, in which each contestant has its turn: a disturbance hits all, and ratios hold.

    rounds: on a CPU; on a GPU as many as `PER_CONTESTANT` allows, one where ``rounds`` is 1.
    warm: what a call reads may be in the caches; on a GPU only.
    """
    if device.type == "cuda":
        return _on_cuda(calls, device, rounds, warm)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_turn_on_cpu(call))
    return times


def _turn_on_cpu(call: Call) -> float:
    """Mean of 1 to 8 calls, after a pause and two calls that bring the contestant's own data into the caches.

    In the pause the last contestant's threads go to sleep: torch.compile's code has a pool of its own, which spins.
    """
    time.sleep(0.05)
    once = _seconds(call)
    if once < LONG:
        once = _seconds(call)
    count = max(1, min(8, int(TURN / max(once, 1e-6))))
    return _seconds(lambda: [call() for _ in range(count)]) / count


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_cuda(calls: dict[str, Call], device: torch.device, rounds: int, warm: bool) -> dict[str, list[float]]:
    """By events. Cold: each call runs after the second-level cache was overwritten; warm: after a call of its own."""
    flushed = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)

    def turn(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Either takes long enough for the host to queue the timed call behind it: launch gaps stay out of the events.
        if warm:
            call()
        else:
            flushed.zero_()
        first.record()
        call()
        last.record()
        return first, last

    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for call in calls.values():
        turn(call)
    torch.cuda.synchronize(device)
    if rounds > 1:
        allowed = int(PER_CONTESTANT * len(calls) / max(time.perf_counter() - start, 1e-6))
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, allowed))
    events = [{name: turn(call) for name, call in calls.items()} for _ in range(rounds)]
    torch.cuda.synchronize(device)
    return {name: [1e-3 * first.elapsed_time(last) for first, last in (row[name] for row in events)] for name in calls}


def median_ratio(times: list[float], others: list[float]) -> float:
    """Median over rounds of ``times`` over ``others``."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def captured(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Call:
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
    truths = _results(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = _results(call)
    for result in replayed:
        result.fill_(torch.nan)
    graph.replay()
    errors = [relative_error(result, truth.double()) for result, truth in zip(replayed, truths, strict=True)]
    if not all(error < LARGEST_ERROR_OF_REPLAY for error in errors):  # also where NaN
        raise RuntimeError(f"a replay gives other results than the call: relative errors {errors}")
    return graph.replay


def _results(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    results = call()
    return (results,) if isinstance(results, Tensor) else results


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Of the norm of the truth."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


@contextlib.contextmanager
def poisoned(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Nothing right is left by chance where results are likely to lie: fresh memory holds NaN.

    On a CPU PyTorch fills it. On a GPU as much memory as ``tensors`` take is filled and freed, since PyTorch's way
    there would choose other algorithms than those that are timed.
    """
    tensors = list(tensors)
    filled = [torch.full_like(tensor, torch.nan) for tensor in tensors if tensor.is_floating_point()]
    del filled
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if on_cpu:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if on_cpu:
            torch.use_deterministic_algorithms(False)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most device memory that one call needs beyond what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """What this machine can do at most: a large copy, read and written, and a large matrix product of random data.

    The product is of bfloat16 on a GPU, of float32 on a CPU. ``quick``: not so large, and so of no meaning.
    """
    elements, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 25, 1024)
    if quick:
        elements, side = 1 << 16, 64
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    left, right = (
        torch.randn(side, side, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        for _ in range(2)
    )
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    times = time_in_turns(calls, device, 1 if quick else 9, warm=False)
    return {
        "copy_gb_per_s": 2e-9 * 4 * elements / statistics.median(times["copy"]),
        "matmul_tflop_per_s": 2e-12 * side**3 / statistics.median(times["product"]),
    }


@functools.cache
def commit() -> str:
    """Short name of the commit, "+" where the tree differs from it; STABLE_SAM_COMMIT where there is no repository."""
    if os.environ.get("STABLE_SAM_COMMIT"):
        return os.environ["STABLE_SAM_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> dict[str, object]:
    """The device, the processor, versions, and how busy the machine is."""
    facts: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}
    facts |= {"cuda": torch.version.cuda, "triton": None, "load_average": os.getloadavg()}
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    facts |= {
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "allow_tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
        "instruction_set": _extension.cpu_instruction_set(),
        "compiler": _extension.build_info().get("compiler"),
        "cpu": _first_line("/proc/cpuinfo", "model name"),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
    }
    if device.type != "cuda":
        named = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        return facts | {"device": named, "gpu": None, "multiprocessors": None, "l2_bytes": None}
    properties = torch.cuda.get_device_properties(device)
    facts |= {"device": properties.name, "gpu": properties.name, "l2_bytes": properties.L2_cache_size}
    return facts | {"multiprocessors": properties.multi_processor_count}


def _first_line(path: str, begins: str = "") -> str | None:
    """The first such line of a file, behind its colon."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((line.split(":", 1)[-1].strip() for line in lines if line.startswith(begins)), None)
