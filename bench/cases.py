"""What is measured: one case a benchmark, and the groups whose contestants are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timing import Call

_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Run(NamedTuple):
    """What the command line asks for. compiled: torch.compile at every size, too. quick: a rehearsal at tiny sizes."""

    device: torch.device
    quick: bool
    compiled: bool
    peak_memory: bool

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dtypes_and_batches(self, *on_cpu: int) -> list[tuple[torch.dtype, int]]:
        """The most telling first; ``on_cpu``: numbers of prompts there."""
        if self.quick:
            return [(torch.float32, 2), (torch.bfloat16, 2)] + [(torch.float16, 1)] * self.on_cuda
        if not self.on_cuda:
            return [(torch.float32, batch) for batch in on_cpu]
        dtypes = (torch.bfloat16, torch.float32, torch.float16)
        return [(dtype, batch) for dtype in dtypes for batch in (64, 16, 1, 256)]

    def caches(self, mode: str, batch: int) -> tuple[str, ...]:
        """States of the caches. Forward with one prompt, where launches rule, also as one CUDA graph."""
        if not self.on_cuda:
            return ("warm",)
        return ("cold", "warm", "graph") if mode == "forward" and batch == 1 else ("cold", "warm")


class WrongResultError(AssertionError):
    """A contestant whose results are wrong is not timed."""


class Work(NamedTuple):
    """A contestant's call, verified, and its relative errors."""

    call: Call
    errors: dict[str, float]

    @staticmethod
    def verified(call: Call, errors: dict[str, float], limit: Callable[[str], float]) -> "Work":
        """``limit``: the largest error of a result by its name.

        Raises:
            WrongResultError: one is larger, or NaN.
        """
        if not all(error <= limit(name) for name, error in errors.items()):
            raise WrongResultError(f"wrong results, not timed: relative errors {errors}")
        return Work(call, errors)


@dataclass(frozen=True)
class Case:
    """One contestant at one size in one mode. All of one group get the same problem, which is made once.

    own: whether this project answers for it. backend: of this project's, that which serves it.
    sizes: T, C, H, W and max_offset. rounds: on a CPU. host_work: the host decides the time.
    ideal_bytes, flops: the fewest that have to be moved and computed.
    """

    device: torch.device
    operation: str
    contestant: str
    mode: str
    dtype: torch.dtype
    batch: int
    cache: str
    problem: Callable[[], Any]
    prepare: Callable[[Any], Work]
    own: bool
    backend: str | None
    sizes: dict[str, object]
    rounds: int
    host_work: bool = False
    ideal_bytes: float | None = None
    flops: float | None = None
    resident_peak: Callable[[], int | None] | None = None

    @property
    def size(self) -> str:
        """``forward-bf16-B64``; a cold cache on a GPU and a warm one on a CPU are not named."""
        usual = "cold" if self.device.type == "cuda" else "warm"
        return "-".join([self.mode, _SHORT[self.dtype], f"B{self.batch}", *[self.cache] * (self.cache != usual)])

    @property
    def id(self) -> str:
        """``forward-bf16-B64-cuda``."""
        return f"{self.size}-{self.contestant.replace(', ', '_').replace(' ', '_')}"

    @property
    def group(self) -> str:
        return f"{self.operation} {self.size}"

    @property
    def key(self) -> str:
        return f"{self.operation} {self.id}"

    @property
    def facts(self) -> dict[str, object]:
        """What `extra_info` says of it before it is timed."""
        facts = {name: getattr(self, name) for name in ("operation", "contestant", "mode", "cache", "backend")}
        facts |= {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type, "B": self.batch}
        facts |= {"host_work": self.host_work and self.cache != "graph"}
        return facts | self.sizes | {"ideal_bytes": self.ideal_bytes, "flops": self.flops}
