"""Clocks, ceilings and facts of the machine, for every benchmark."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sample:
    """Microseconds of repeated runs."""

    median: float
    p20: float
    p80: float
    runs: int

    @staticmethod
    def of(microseconds: list[float]) -> "Sample":
        fifths = statistics.quantiles(microseconds, n=5) if len(microseconds) > 1 else microseconds * 4
        return Sample(statistics.median(microseconds), fifths[0], fifths[3], len(microseconds))


class Clock:
    """Times calls on one device; on CUDA with events, each run after the second-level cache was overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object], *, warm: bool = False, seconds: float = 0.25, most: int = 100) -> Sample:
        """Median of as many runs as fit into ``seconds``; ``warm``: inputs may be in the cache."""
        for _ in range(3):
            call()
        start = time.perf_counter()
        self._run(call, warm)
        self.synchronize()
        once = max(time.perf_counter() - start, 1e-6)
        runs = max(5, min(most, int(seconds / once)))
        if self.device.type == "cuda":
            pairs = [self._run(call, warm) for _ in range(runs)]
            self.synchronize()
            return Sample.of([1e3 * first.elapsed_time(last) for first, last in pairs])
        return Sample.of([1e6 * self._run_on_cpu(call) for _ in range(runs)])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Most device memory that one call needs beyond what is allocated before it; None on the CPU."""
        if self.device.type != "cuda":
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _run(self, call: Callable[[], object], warm: bool) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        if self.device.type != "cuda":
            call()
            return None
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if not warm:
            # Long enough for the host to queue the timed call behind it, so launch gaps stay out of the events.
            self._flush.zero_()
        first.record()
        call()
        last.record()
        return first, last

    @staticmethod
    def _run_on_cpu(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def copy_bandwidth(clock: Clock) -> float:
    """Bytes read and written a second by a large copy on the device: the ceiling of memory-bound kernels."""
    elements = (1 << 30 if clock.device.type == "cuda" else 1 << 24) // 4
    source = torch.randn(elements, device=clock.device)
    target = torch.empty_like(source)
    return 2 * 4 * elements / (clock.time(lambda: target.copy_(source), most=30).median * 1e-6)


def matmul_rate(clock: Clock) -> float:
    """FLOP a second of a large bfloat16 matrix product on random data: the ceiling of compute-bound kernels."""
    side = 8192 if clock.device.type == "cuda" else 256
    left, right = (torch.randn(side, side, device=clock.device).to(torch.bfloat16) for _ in range(2))
    return 2 * side**3 / (clock.time(lambda: left @ right, warm=True, most=20).median * 1e-6)


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
    facts: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}
    facts["cuda"] = torch.version.cuda
    facts["allow_tf32"] = torch.backends.cuda.matmul.allow_tf32
    facts["allow_tf32_in_convolutions"] = torch.backends.cudnn.allow_tf32
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = properties.L2_cache_size
    else:
        facts["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return facts
