"""Times the selected contestants of a group in turns, and hands each benchmark its own samples."""

import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cases import Contestant, Group, Work
from pytest_benchmark.fixture import BenchmarkFixture
from timing import captured, ceilings, commit, median_ratio, peak_bytes, time_in_turns


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


class Measured(NamedTuple):
    """Seconds of every round, and what ``extra_info`` gets."""

    samples: list[float]
    info: dict[str, object]


class Turns:
    """One session's measurements, of which only the group at hand is kept.

    selected: contestants by their group's name, what -k and the like have left.
    deadline: by ``time.monotonic``; no group begins after it.
    """

    def __init__(self, device: torch.device, quick: bool, deadline: float) -> None:
        self.selected: dict[str, list[Contestant]] = {}
        self.clock = ReplayClock()
        self._device, self._quick, self._deadline = device, quick, deadline
        self._group, self._problem = "", None
        self._outcomes: dict[str, Measured | BaseException] = {}
        self._ceilings: dict[str, float] = {}

    @property
    def ceilings(self) -> dict[str, float]:
        """Of this run."""
        self._ceilings = self._ceilings or ceilings(self._device, self._quick)
        return self._ceilings

    def report(self, group: Group, contestant: Contestant, benchmark: BenchmarkFixture) -> None:
        """Give the benchmark its samples; with --benchmark-disable verify the contestant and call it once.

        Raises:
            WrongResultError: its results are wrong.
            pytest.skip.Exception: it cannot do this, or the time is up.
        """
        if self._group != group.name:
            self._group, self._problem, self._outcomes = group.name, None, {}  # what the last group held goes first
            self._problem = group.problem()
            if benchmark.enabled:
                self._outcomes = self._measure(group, self.selected[group.name])
                self._problem = None
        if benchmark.disabled:
            benchmark.pedantic(_unless_failed(_prepared(group, contestant, self._problem)).call)
            return
        measured = _unless_failed(self._outcomes[contestant.name])
        self.clock.load(measured.samples)
        benchmark.extra_info.update(measured.info)
        benchmark.pedantic(self.clock.advance, rounds=len(measured.samples))

    def _measure(self, group: Group, contestants: list[Contestant]) -> dict[str, Measured | BaseException]:
        if time.monotonic() > self._deadline:
            return {contestant.name: pytest.skip.Exception("out of time") for contestant in contestants}
        prepared = {contestant.name: _prepared(group, contestant, self._problem) for contestant in contestants}
        works = {name: work for name, work in prepared.items() if isinstance(work, Work)}
        calls = {name: work.call for name, work in works.items()}
        samples = time_in_turns(calls, self._device, 2 if self._quick else group.rounds, warm=group.cache != "cold")
        outcomes: dict[str, Measured | BaseException] = dict(prepared)
        for contestant in contestants:
            if contestant.name in works:
                info = group.facts(contestant) | self._info(works[contestant.name], contestant.name, samples)
                peak = contestant.resident_peak or partial(peak_bytes, calls[contestant.name], self._device)
                info["peak_bytes"] = None if group.cache == "graph" else peak()
                outcomes[contestant.name] = Measured(samples[contestant.name], info)
        del prepared, works, calls
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return outcomes

    def _info(self, work: Work, name: str, samples: dict[str, list[float]]) -> dict[str, object]:
        own, median = samples[name], statistics.median(samples[name])
        info: dict[str, object] = {"commit": commit(), "error": max(work.errors.values()), "errors": work.errors}
        info["ratios"] = {other: median_ratio(times, own) for other, times in samples.items() if other != name}
        info |= {"ideal_bytes": work.ideal_bytes, "flops": work.flops}
        info |= {"gb_per_s": None, "percent_of_copy": None, "percent_of_matmul": None}
        if work.ideal_bytes is not None:
            info["gb_per_s"] = 1e-9 * work.ideal_bytes / median
            info["percent_of_copy"] = 100 * info["gb_per_s"] / self.ceilings["copy_gb_per_s"]
        if work.flops is not None:
            info["percent_of_matmul"] = 1e-10 * work.flops / median / self.ceilings["matmul_tflop_per_s"]
        return info


def _unless_failed(outcome: Any) -> Any:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _prepared(group: Group, contestant: Contestant, problem: object) -> Work | BaseException:
    """Its verified work, or why there is none: one contestant's failure must not cost the others their figures."""
    try:
        work = contestant.prepare(problem)
    except Exception as error:
        cannot = isinstance(error, torch.OutOfMemoryError) or "not implemented for" in str(error)
        return pytest.skip.Exception(str(error)[:300]) if cannot else error
    if group.cache != "graph":
        return work
    try:
        return work._replace(call=captured(work.call))
    except Exception as error:  # whatever in the call a graph cannot hold
        return pytest.skip.Exception(f"not captured: {type(error).__name__}: {str(error)[:300]}")
