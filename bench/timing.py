"""Clocks, ceilings and facts of the machine."""

import contextlib
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], object]

LARGEST_ERROR_OF_REPLAY = 2e-2  # in half types a graph may take matrix products of another order of summation
TURN, LONG = 0.1, 0.5  # seconds on a CPU: of a turn of quick calls; of a call before which one warms up enough
PER_CONTESTANT, FEWEST, MOST = 0.15, 5, 60  # seconds of timing on a GPU, within so many rounds


def time_in_turns(calls: dict[str, Call], device: torch.device, rounds: int, warm: bool) -> dict[str, list[float]]:
    """Seconds a call of every round, in which each contestant has its turn: a disturbance hits all, and ratios hold.

    rounds: on a CPU; on a GPU as many as `PER_CONTESTANT` allows, unless ``rounds`` is less than `FEWEST`.
    warm: what a call reads may be in the caches; on a CPU it always is.
    """
    if device.type == "cuda":
        return _time_by_events(calls, device, rounds, warm)
    turns = [{name: _turn_on_cpu(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in calls}


def _turn_on_cpu(call: Call) -> float:
    """Mean of 1 to 8 calls, after a pause and two calls that bring the contestant's own data into the caches.

    In the pause the last contestant's threads go to sleep: torch.compile's code has a pool of its own, which spins.
    """
    time.sleep(0.05)
    once = _seconds(call)
    if once < LONG:
        once = _seconds(call)
    count = max(1, min(8, int(TURN / max(once, 1e-6))))
    return _seconds(call, count) / count


def _seconds(call: Call, count: int = 1) -> float:
    """Of ``count`` calls. Each result is given up before the next call, which so finds its memory again."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _time_by_events(calls: dict[str, Call], device: torch.device, rounds: int, warm: bool) -> dict[str, list[float]]:
    """Cold: each call runs after the second-level cache was overwritten. Warm: after a call of its own."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def run_turns(count: int) -> dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
        events = {name: [] for name in calls}
        for _ in range(count):
            for name, call in calls.items():
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                # Long enough for the host to queue the timed call behind it: launch gaps stay out of the events.
                (call if warm else flushed.zero_)()
                first.record()
                call()
                last.record()
                events[name].append((first, last))
        torch.cuda.synchronize(device)
        return events

    run_turns(3)
    once = _seconds(lambda: run_turns(1))
    if rounds >= FEWEST:
        rounds = max(FEWEST, min(MOST, int(PER_CONTESTANT * len(calls) / once)))
    return {
        name: [1e-3 * first.elapsed_time(last) for first, last in pairs] for name, pairs in run_turns(rounds).items()
    }


def captured(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Call:
    """The same work replayed as one CUDA graph: launch times, which rule where prompts are few, stay out of it.

    Raises:
        RuntimeError: ``call`` cannot be captured, or a replay gives other results than the call.
    """

    def results() -> tuple[Tensor, ...]:
        found = call()
        return (found,) if isinstance(found, Tensor) else found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and loaded before, not while, a graph is captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    truths, graph = results(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = results()
    for result in replayed:
        result.fill_(torch.nan)
    graph.replay()
    errors = [relative_error(result, truth) for result, truth in zip(replayed, truths, strict=True)]
    if not all(error < LARGEST_ERROR_OF_REPLAY for error in errors):  # also where NaN
        raise RuntimeError(f"a replay gives other results than the call: relative errors {errors}")
    return graph.replay


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Of the norm of the truth."""
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()


@contextlib.contextmanager
def poisoned(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Nothing right is left by chance where results are likely to lie: fresh memory holds NaN.

    On a CPU PyTorch fills it. On a GPU as much memory as ``tensors`` take is filled and freed, since PyTorch's way
    there would choose other algorithms than those that are timed.
    """
    filled = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    on_cpu = filled[0].device.type == "cpu"
    del filled
    torch.use_deterministic_algorithms(on_cpu, warn_only=True)
    try:
        yield
    finally:
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
    on_cuda = device.type == "cuda"
    elements, side = (1 << 16, 64) if quick else (1 << 28, 8192) if on_cuda else (1 << 25, 1024)
    source = torch.randn(elements, device=device)
    target, factor = torch.empty_like(source), torch.randn(side, side, device=device)
    factor = factor.bfloat16() if on_cuda else factor
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "product": lambda: factor @ factor}
    times = time_in_turns(calls, device, 1 if quick else 9, warm=False)
    copy, product = (statistics.median(times[name]) for name in calls)
    return {"copy_gb_per_s": 8e-9 * elements / copy, "matmul_tflop_per_s": 2e-12 * side**3 / product}


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
    from stable_sam_cuda.ops import libraries  # here: bench/gpu_calls.py needs this file before anything is built

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "load_average": os.getloadavg(),
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None),
        "instruction_set": libraries.cpu_instruction_set(),
        "compiler": libraries.build_info().get("compiler"),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "allow_tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
    if device.type != "cuda":
        return facts | {"gpu": None, "multiprocessors": None, "l2_bytes": None}
    properties = torch.cuda.get_device_properties(device)
    facts |= {"device": properties.name, "gpu": properties.name, "l2_bytes": properties.L2_cache_size}
    return facts | {"multiprocessors": properties.multi_processor_count}
