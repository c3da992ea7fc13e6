"""Times the selected contestants of a group in turns, and hands each benchmark its own samples."""

import statistics
import time
from typing import NamedTuple

import pytest
import torch
from cases import Case, Work
from pytest_benchmark.fixture import BenchmarkFixture
from timing import ReplayClock, captured, ceilings, commit, median_ratio, peak_bytes, time_in_turns

CLOCK = ReplayClock()


class Outcome(NamedTuple):
    """Seconds of every round, and what `extra_info` gets besides the case's own facts."""

    samples: list[float]
    info: dict[str, object]


class Turns:
    """One session's measurements; only the group at hand is kept.

    selected: cases by group, what -k and the like have left. deadline: by ``time.monotonic``; no group begins after it.
    """

    def __init__(self, device: torch.device, quick: bool, deadline: float) -> None:
        self.selected: dict[str, list[Case]] = {}
        self._device, self._quick, self._deadline = device, quick, deadline
        self._group: str | None = None
        self._outcomes: dict[str, Outcome | BaseException] = {}
        self._ceilings: dict[str, float] | None = None

    @property
    def ceilings(self) -> dict[str, float]:
        """Of this run."""
        if self._ceilings is None:
            self._ceilings = ceilings(self._device, self._quick)
        return self._ceilings

    def report(self, case: Case, benchmark: BenchmarkFixture) -> None:
        """Give the benchmark the case's samples; without timing (--benchmark-disable) verify the case and call it once.

        Raises:
            WrongResultError: its results are wrong.
            pytest.skip.Exception: another's implementation cannot do it, or the time is up.
        """
        if benchmark.disabled:
            work = _prepared(case, case.problem())
            if isinstance(work, BaseException):
                raise work
            benchmark.pedantic(work.call)
            return
        if self._group != case.group:
            self._group, self._outcomes = case.group, {}  # what the last group held goes first
            self._outcomes = self._measure(self.selected[case.group])
        outcome = self._outcomes[case.key]
        if isinstance(outcome, BaseException):
            raise outcome
        CLOCK.load(outcome.samples)
        benchmark.extra_info.update(case.facts | outcome.info)
        benchmark.pedantic(CLOCK.advance, rounds=len(outcome.samples))

    def _measure(self, cases: list[Case]) -> dict[str, Outcome | BaseException]:
        if time.monotonic() > self._deadline:
            return {case.key: pytest.skip.Exception("out of time") for case in cases}
        problem = cases[0].problem()
        works = {case.key: _prepared(case, problem) for case in cases}
        outcomes: dict[str, Outcome | BaseException] = {
            key: work for key, work in works.items() if isinstance(work, BaseException)
        }
        ready = [(case, work) for case in cases if isinstance(work := works[case.key], Work)]
        if ready:
            first, rounds = ready[0][0], 2 if self._quick else ready[0][0].rounds
            calls = {case.contestant: work.call for case, work in ready}
            samples = time_in_turns(calls, self._device, rounds, warm=first.cache != "cold")
            for case, work in ready:
                outcomes[case.key] = Outcome(samples[case.contestant], self._info(case, work, samples))
        if self._device.type == "cuda":
            del problem, works, ready
            torch.cuda.empty_cache()
        return outcomes

    def _info(self, case: Case, work: Work, samples: dict[str, list[float]]) -> dict[str, object]:
        median = statistics.median(samples[case.contestant])
        ratios = {
            other: median_ratio(times, samples[case.contestant])
            for other, times in samples.items()
            if other != case.contestant
        }
        info: dict[str, object] = {"error": max(work.errors.values()), "errors": work.errors, "ratios": ratios}
        info |= {"commit": commit(), "gb_per_s": None, "percent_of_copy": None, "percent_of_matmul": None}
        if case.ideal_bytes is not None:
            info["gb_per_s"] = rate = 1e-9 * case.ideal_bytes / median
            info["percent_of_copy"] = 100 * rate / self.ceilings["copy_gb_per_s"]
        if case.flops is not None:
            info["percent_of_matmul"] = 1e-10 * case.flops / median / self.ceilings["matmul_tflop_per_s"]
        peak = case.resident_peak or (lambda: peak_bytes(work.call, self._device))
        return info | {"peak_bytes": peak() if case.cache != "graph" else None}


def _prepared(case: Case, problem: object) -> Work | BaseException:
    """The verified work, or why there is none: one contestant's failure must not cost the others their figures."""
    try:
        work = case.prepare(problem)
    except AssertionError as error:
        return error
    except Exception as error:  # a compiler's, too
        return error if case.own else pytest.skip.Exception(f"{type(error).__name__}: {str(error)[:300]}")
    if case.cache != "graph":
        return work
    try:
        return work._replace(call=captured(work.call))
    except Exception as error:  # whatever in the call a graph cannot hold
        return pytest.skip.Exception(f"not captured: {type(error).__name__}: {str(error)[:300]}")
