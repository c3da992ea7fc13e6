"""Timing contestants on a CPU in turns, so that a disturbance hits all of them and their ratios hold."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from timing import ROOT, Sample, commit

from stable_sam_cuda import _extension


def time_in_turns(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds a call, of every round: the mean over the timed calls of a turn.

    In every round each contestant has its turn: a pause, in which the last contestant's threads go to sleep
    (torch.compile's code has a thread pool of its own, which spins for a while), two calls not timed, which bring the
    contestant's own data into the caches, and ``calls`` that are.

    ``clock``: ``time.process_time`` counts the seconds of all threads, whatever else the machine does meanwhile.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            time.sleep(0.05)
            for _ in range(2):
                call()
            start = clock()
            for _ in range(calls):
                call()
            times[name].append(1e3 * (clock() - start) / calls)
    return times


def summary(own_times: list[float], times: list[float]) -> dict[str, float]:
    """Times of one contestant, and the median over rounds of its ratio to ours."""
    sample = Sample.of(times)
    ratios = [other / ours for other, ours in zip(times, own_times, strict=True)]
    return {
        "median_ms": sample.median,
        "p20_ms": sample.p20,
        "p80_ms": sample.p80,
        "rounds": sample.runs,
        "times_slower_than_own": statistics.median(ratios),
    }


def cpu_facts() -> dict[str, object]:
    """The processor, its instruction set, the compiler of the kernels, and how busy the machine is."""
    facts: dict[str, object] = {"instruction_set": _extension.cpu_instruction_set(), "load_average": os.getloadavg()}
    facts["compiler"] = _extension.build_info().get("compiler")
    for name, file in (("cpu", "/proc/cpuinfo"), ("huge_pages", "/sys/kernel/mm/transparent_hugepage/enabled")):
        lines = Path(file).read_text().splitlines() if Path(file).exists() else []
        if name == "cpu":
            lines = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        facts[name] = lines[0] if lines else None
    return facts


def write_record(record: dict[str, object], out: Path | None, before: str = "", behind: str = "") -> None:
    """``record`` as JSON to ``out``, by default bench/results/cpu/BEFORE<date>-<commit>BEHIND.json."""
    name = f"{before}{str(record['date'])[:10]}-{commit().rstrip('+')}{behind}.json"
    path = out or ROOT / "bench" / "results" / "cpu" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")
