"""What this project asks of its speed, and which recorded figures answer it: bench/report.py sets them side by side."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

Record = dict

DTYPES = ("bfloat16", "float32", "float16")
BATCHES = (1, 16, 64, 256)


class Reading(NamedTuple):
    value: float
    where: str


class OnGpu(NamedTuple):
    """A figure of a GPU record beside another of the same run, both from a cold cache; ``percent``: beside the copy.

    ours, theirs: operation and provider. quantity: "faster" (their time over ours), "time", "memory" (ours over theirs)
    or "percent".
    """

    part: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    mode: str
    dtype: str
    batch: int
    quantity: str

    def read(self, record: Record) -> Reading | None:
        """None where the record lacks one of the two."""
        ours, theirs = self._figure(record, self.ours), self._figure(record, self.theirs)
        if ours is None or theirs is None:
            return None
        times = ours["microseconds"]["median"], theirs["microseconds"]["median"]
        if self.quantity == "memory" and None in (ours["peak_bytes"], theirs["peak_bytes"]):
            return None
        value = {
            "faster": lambda: times[1] / times[0],
            "time": lambda: times[0] / times[1],
            "memory": lambda: ours["peak_bytes"] / max(theirs["peak_bytes"], 1),
            "percent": lambda: ours["percent_of_copy"],
        }[self.quantity]()
        return Reading(value, f"{self.dtype}, B = {self.batch}")

    def _figure(self, record: Record, contestant: tuple[str, str]) -> Record | None:
        wanted = (*contestant, self.mode, self.dtype, self.batch, "cold")
        names = ("operation", "provider", "mode", "dtype", "B", "cache")
        figures = (record.get(self.part) or {}).get("records", ())
        found = [f for f in figures if "microseconds" in f and tuple(f.get(name) for name in names) == wanted]
        return found[0] if found else None


class OnCpu(NamedTuple):
    """Two contestants of a CPU record, by their ratios to the record's first, which were taken turn by turn.

    quantity: "faster" (their time over ours) or "time" (ours over theirs).
    """

    kind: str
    ours: str
    theirs: str
    mode: str | None
    batch: int
    quantity: str = "faster"

    def read(self, record: Record) -> Reading | None:
        """None where the record lacks one of the two."""
        if kind_of(record) != self.kind:
            return None
        ratios = {
            result["contestant"]: result[RATIOS[self.kind]]
            for result in record["results"]
            if result.get("mode") == self.mode and result["shape"].startswith(f"B={self.batch} ")
        }
        if not {self.ours, self.theirs} <= ratios.keys():
            return None
        faster = ratios[self.theirs] / ratios[self.ours]
        return Reading(faster if self.quantity == "faster" else 1 / faster, f"{self.ours}, `{record['path']}`")


class ByTheClock(NamedTuple):
    """Seconds of a contestant of bench/cpu_picture.py, from a picture's pixels to a mask."""

    contestant: str

    def read(self, record: Record) -> Reading | None:
        """None where the record has no such time."""
        if kind_of(record) != "picture":
            return None
        for result in record["results"]:
            if (result["what"], result["contestant"]) == ("encoder and decoder", self.contestant):
                return Reading(result["median_ms"] / 1e3, f"{self.contestant}, `{record['path']}`")
        return None


RATIOS = {
    "sampler": "times_slower_than_own",
    "attention": "times_slower_than_fused",
    "decoder": "times_the_first",
    "picture": "times_plain_sam",
}


def kind_of(record: Record) -> str:
    """Which of bench/cpu_*.py wrote a CPU record."""
    (kind,) = [kind for kind, ratio in RATIOS.items() if ratio in record["results"][0]]
    return kind


@dataclass(frozen=True)
class Target:
    what: str
    against: str
    bound: float
    at_least: bool  # otherwise at most
    unit: str
    comparisons: tuple[OnGpu | OnCpu | ByTheClock, ...]  # all are to hold

    @property
    def asked(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}"

    def readings(self, records: Iterable[Record]) -> list[Reading]:
        """One a comparison, of the first record that has it."""
        records = list(records)
        found = []
        for comparison in self.comparisons:
            read = (comparison.read(record) for record in records)
            found += [reading for reading in read if reading is not None][:1]
        return found

    def worst(self, readings: list[Reading]) -> Reading:
        return (min if self.at_least else max)(readings, key=lambda reading: reading.value)

    def holds(self, reading: Reading) -> bool:
        return reading.value >= self.bound if self.at_least else reading.value <= self.bound


_SAMPLER, _LAYER, _DECODER, _STEP = (
    ("deformable_sample", "cuda"),
    ("layer", "fused"),
    ("decoder", "fused"),
    ("training_step", "fused"),
)


def _sampler(mode: str, provider: str, quantity: str = "faster") -> tuple[OnGpu, ...]:
    return (OnGpu("sampler", _SAMPLER, (_SAMPLER[0], provider), mode, "bfloat16", 64, quantity),)


def _layer(operation: str, provider: str, batches: tuple[int, ...], quantity: str) -> tuple[OnGpu, ...]:
    theirs = (operation, provider)
    return tuple(OnGpu("attention", _LAYER, theirs, "forward", "bfloat16", batch, quantity) for batch in batches)


def _decoder(quantity: str) -> tuple[OnGpu, ...]:
    sizes = product(DTYPES, BATCHES)
    return tuple(OnGpu("decoder", _DECODER, ("decoder", "sam"), "forward", *size, quantity) for size in sizes)


def _step(quantity: str) -> tuple[OnGpu, ...]:
    theirs = ("training_step", "eager")
    return tuple(OnGpu("decoder", _STEP, theirs, "step", dtype, 32, quantity) for dtype in DTYPES)


_PLAIN = "plain SAM's attention, no plugin"
_SAM = "`segment_anything`'s decoder, no plugin"
# The target asks for the sampler in bfloat16 at 64 prompts; where it names no size, that one is taken.
GPU = (
    Target(
        "sampler forward, B = 64, bf16", "copy, ideal bytes", 85, True, "%", _sampler("forward", _SAMPLER[1], "percent")
    ),
    Target("sampler forward, B = 64, bf16", "eager chain", 4, True, "x as fast", _sampler("forward", "eager")),
    Target(
        "sampler forward, B = 64, bf16", "`torch.compile`", 1.3, True, "x as fast", _sampler("forward", "torch.compile")
    ),
    Target("sampler backward, B = 64, bf16", "eager chain", 5, True, "x as fast", _sampler("backward", "eager")),
    Target(
        "sampler backward, B = 64, bf16", "`torch.compile`", 4, True, "x as fast", _sampler("backward", "torch.compile")
    ),
    Target(
        "plugin and attention, B = 64, bf16",
        "eager chain",
        5,
        True,
        "x as fast",
        _layer("layer", "eager", (64,), "faster"),
    ),
    Target(
        "plugin and attention, B = 16 to 256, bf16",
        f"{_PLAIN}, eager",
        1.0,
        False,
        "x its time",
        _layer("plain", "eager", (16, 64, 256), "time"),
    ),
    Target(
        "plugin and attention, B = 16 to 256, bf16",
        f"{_PLAIN}, by SDPA",
        1.2,
        False,
        "x its time",
        _layer("plain", "sdpa", (16, 64, 256), "time"),
    ),
    Target("stabilised decoder, B = 1 to 256", _SAM, 1.0, False, "x its time", _decoder("time")),
    Target("stabilised decoder, B = 1 to 256", _SAM, 1.0, False, "x its peak memory", _decoder("memory")),
    Target("training step, cached embeddings, B = 32", "eager chain", 3, True, "x as fast", _step("faster")),
    Target("training step, cached embeddings, B = 32", "eager chain", 0.5, False, "x its peak memory", _step("memory")),
)


def _on_cpu(mode: str, batch: int) -> tuple[OnCpu, ...]:
    return (OnCpu("sampler", "stable_sam_cuda", "eager", mode, batch),)


_HEAD = " + offset head"  # the offset network's part of the plugin, which the attention's own figures leave out
CPU = (
    Target("sampler forward, B = 1", "eager chain", 12, True, "x as fast", _on_cpu("forward", 1)),
    Target("sampler forward, B = 16", "eager chain", 4, True, "x as fast", _on_cpu("forward", 16)),
    Target("sampler forward and backward, B = 1", "eager chain", 5, True, "x as fast", _on_cpu("forward+backward", 1)),
    Target(
        "sampler forward and backward, B = 16", "eager chain", 3, True, "x as fast", _on_cpu("forward+backward", 16)
    ),
    Target(
        "plugin and attention, B = 16",
        "eager chain",
        3,
        True,
        "x as fast",
        tuple(OnCpu("attention", f"fused{head}", f"eager{head}", None, 16) for head in ("", _HEAD)),
    ),
    Target(
        "plugin and attention, B = 16",
        _PLAIN,
        1.2,
        False,
        "x its time",
        tuple(OnCpu("attention", f"fused{head}", "plain SAM", None, 16, "time") for head in ("", _HEAD)),
    ),
    Target(
        "`sam_lite`, a picture of 1024 px, one box, encoder and decoder",
        "the clock",
        1,
        False,
        "s",
        (ByTheClock("SAM"), ByTheClock("Stable-SAM")),
    ),
)
