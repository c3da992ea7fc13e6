"""Times the selected contestants of a group in turns, and hands each benchmark its own samples."""

import statistics
import time
import traceback
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from cases import Contestant, Group, Work
from pytest_benchmark.fixture import BenchmarkFixture
from timing import captured, ceilings, commit, peak_bytes, time_in_turns

LOST = 6  # exit code of a session whose device answers every further call with the same error


class ReplayClock:
    """A timer for pytest-benchmark that tells the times measured before, one a round."""

    def __init__(self) -> None:
        self._now = 0.0
        self.samples: Iterator[float] = iter(())

    def advance(self) -> None:
        """What pytest-benchmark is told to time: one round, over at once."""
        self._now += next(self.samples)

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
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if time.monotonic() < self._deadline:
                self._problem = group.problem()
        if self._problem is None:
            pytest.skip("out of time")
        if benchmark.disabled:
            benchmark.pedantic(_prepare(group, contestant, self._problem).call)
            return
        if not self._outcomes:
            contestants = self.selected[group.name]
            try:
                self._outcomes = self._measure(group, contestants)
            except Exception as failure:  # of the timing itself, which is not tried again for every contestant
                if isinstance(failure, getattr(torch, "AcceleratorError", ())):
                    pytest.exit(f"{group.name}: the device is lost to this process: {failure}", returncode=LOST)
                self._outcomes = {contestant.name: failure for contestant in contestants}
        outcome = self._outcomes[contestant.name]
        if isinstance(outcome, BaseException):
            raise outcome
        self.clock.samples = iter(outcome.samples)
        benchmark.extra_info.update(outcome.info)
        benchmark.pedantic(self.clock.advance, rounds=len(outcome.samples))

    def _measure(self, group: Group, contestants: list[Contestant]) -> dict[str, Measured | BaseException]:
        outcomes: dict[str, Measured | BaseException] = {}
        works: dict[str, Work] = {}
        for contestant in contestants:
            try:
                works[contestant.name] = _prepare(group, contestant, self._problem)
            except (Exception, pytest.skip.Exception) as failure:  # must not cost the others figures, or memory
                traceback.clear_frames(failure.__traceback__)
                outcomes[contestant.name] = failure
        calls, rounds = {name: work.call for name, work in works.items()}, 1 if self._quick else group.rounds
        samples = time_in_turns(calls, self._device, rounds, warm=group.cache != "cold")
        for contestant in contestants:
            name = contestant.name
            if name in works:
                peak = works[name].resident_peak or partial(peak_bytes, calls[name], self._device)
                info = group.facts(contestant) | self._figures(works[name], name, samples)
                info["peak_bytes"] = None if group.cache == "graph" else peak()
                outcomes[name] = Measured(samples[name], info)
        return outcomes

    def _figures(self, work: Work, name: str, samples: dict[str, list[float]]) -> dict[str, object]:
        own, median = samples[name], statistics.median(samples[name])
        ratios = {
            other: statistics.median(one / another for one, another in zip(times, own, strict=True))
            for other, times in samples.items()
            if other != name
        }
        moved, done, ceiling = work.ideal_bytes, work.flops, self.ceilings
        return {
            "commit": commit(),
            "error": max(work.errors.values()),
            "errors": work.errors,
            "ratios": ratios,
            "ideal_bytes": moved,
            "flops": done,
            "gb_per_s": moved and 1e-9 * moved / median,
            "percent_of_copy": moved and 1e-7 * moved / median / ceiling["copy_gb_per_s"],
            "percent_of_matmul": done and 1e-10 * done / median / ceiling["matmul_tflop_per_s"],
        }


def _prepare(group: Group, contestant: Contestant, problem: object) -> Work:
    """Its verified work; what it cannot do is a reason to skip it."""
    try:
        work = contestant.prepare(problem)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "not implemented for" in str(error):
            traceback.clear_frames(error.__traceback__)
            pytest.skip(str(error)[:300])
        raise
    if group.cache == "graph":
        try:
            return work._replace(call=captured(work.call))
        except Exception as error:  # whatever in the call a graph cannot hold
            pytest.skip(f"not captured: {type(error).__name__}: {str(error)[:300]}")
    return work
