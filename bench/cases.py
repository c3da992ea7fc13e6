"""What is measured: groups of contestants that do the same work at one size, one benchmark each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timing import Call

_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Run(NamedTuple):
    """What the command line asks for. quick: tiny sizes. compiled: torch.compile at every size, and on a CPU."""

    device: torch.device
    quick: bool
    compiled: bool
    peak_memory: bool

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dtypes_and_batches(self, on_cpu: tuple[int, ...]) -> list[tuple[torch.dtype, int]]:
        """The most telling first; ``on_cpu``: numbers of prompts there."""
        if self.quick:
            return [(torch.float32, 2), (torch.bfloat16, 1)]
        if not self.on_cuda:
            return [(torch.float32, batch) for batch in on_cpu]
        dtypes = (torch.bfloat16, torch.float32, torch.float16)
        return [(dtype, batch) for dtype in dtypes for batch in (64, 16, 1, 256)]

    def caches(self, mode: str, batch: int) -> list[str]:
        """States of the caches. Forward with one prompt, where launches rule, also as one CUDA graph."""
        return ["cold", "warm", *["graph"] * (mode == "forward" and batch == 1)] if self.on_cuda else ["warm"]


class WrongResultError(AssertionError):
    """A contestant whose results are wrong is not timed."""


class Work(NamedTuple):
    """A contestant's call, its relative errors, and the fewest bytes and FLOP that it has to move and do.

    resident_peak: bytes that a call adds to a process on a CPU, where that is asked for.
    """

    call: Call
    errors: dict[str, float]
    ideal_bytes: float | None = None
    flops: float | None = None
    resident_peak: Callable[[], int] | None = None

    def verified(self, limit: Callable[[str], float]) -> "Work":
        """Itself. ``limit``: the largest error of a result by its name.

        Raises:
            WrongResultError: one is larger, or NaN.
        """
        if not all(error <= limit(name) for name, error in self.errors.items()):
            raise WrongResultError(f"wrong results, not timed: relative errors {self.errors}")
        return self


class Contestant(NamedTuple):
    """``prepare`` makes verified work of a group's problem. ``backend`` serves it, if it is this project's own."""

    name: str
    prepare: Callable[[Any], Work]
    backend: str | None = None


@dataclass(frozen=True)
class Group:
    """Contestants that get the same problem and are timed in turns.

    sizes: T, C, H, W and max_offset. rounds: on a CPU. host_work: the host decides the time.
    """

    operation: str
    mode: str
    dtype: torch.dtype
    batch: int
    cache: str
    device: torch.device
    sizes: dict[str, object]
    problem: Callable[[], Any]
    contestants: list[Contestant]
    rounds: int
    host_work: bool = False

    @property
    def size(self) -> str:
        """``forward-bf16-B64``; a cold cache on a GPU and a warm one on a CPU are not named."""
        usual = "cold" if self.device.type == "cuda" else "warm"
        return "-".join([self.mode, _SHORT[self.dtype], f"B{self.batch}", *[self.cache] * (self.cache != usual)])

    @property
    def name(self) -> str:
        return f"{self.operation} {self.size}"

    def facts(self, contestant: Contestant) -> dict[str, object]:
        """What ``extra_info`` says before anything is timed."""
        facts = {"operation": self.operation, "contestant": contestant.name, "backend": contestant.backend}
        facts |= {"mode": self.mode, "cache": self.cache, "dtype": str(self.dtype).removeprefix("torch.")}
        facts |= {"device": self.device.type, "B": self.batch, **self.sizes}
        return facts | {"host_work": self.host_work and self.cache != "graph"}
