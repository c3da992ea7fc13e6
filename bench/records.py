"""Reads the files of `pytest bench --benchmark-json`, and lays their figures out as Markdown.

It needs the standard library alone: bench/gpu_calls.py reads its results where nothing else may be installed.
"""

import json
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# This project's contestants; the first that a group has is the one that the others stand beside.
OWN = ("cuda", "cpu", "fused", "triton", "sampled", "fused, both blocks", "cpu, NCHW", "sam, shared")
TITLES = {
    "deformable_sample": "Sampler",
    "deformable_attention": "Attention with sampling and blending",
    "offset_head": "Offset head",
    "layer": "Plugin and attention",
    "decoder": "Mask decoder",
    "predict": "One box on a picture that is set",
    "set_image + predict": "A picture with one box, encoder included",
    "training_step": "A step of the plugin's training",
}
_GROUP = ("operation", "mode", "dtype", "B", "T", "C", "H", "W", "max_offset", "cache")


@dataclass(frozen=True)
class Figure:
    """One benchmark: the record that it stands in, the machine, its ``extra_info``, and seconds."""

    path: str
    date: str
    machine: dict
    info: dict
    median: float
    p20: float
    p80: float

    def __getitem__(self, name: str) -> object:
        """A fact of ``extra_info``, None where it is not there."""
        return self.info.get(name)

    @property
    def is_gpu(self) -> bool:
        return bool(self.machine.get("gpu"))

    @property
    def machine_name(self) -> str:
        facts = ("device",) if self.is_gpu else ("cpu", "device", "instruction_set")
        return ", ".join(str(self.machine[fact]) for fact in facts if self.machine.get(fact))

    @property
    def group(self) -> tuple[object, ...]:
        """What figures must have in common to be compared."""
        return self.machine_name, *(self[name] for name in _GROUP)

    def slower(self, other: "Figure") -> float:
        """The time of ``other`` over this one's: where they took turns the median over rounds, else of the medians."""
        ratio = (self["ratios"] or {}).get(other["contestant"])
        return other.median / self.median if ratio is None else ratio


def read(path: Path, shown: str) -> list[Figure]:
    """The file's figures; without the times of all rounds the quartiles stand for p20 and p80.

    shown: the path that readers are told.

    Raises:
        ValueError: the file is not one of this project's benchmarks by pytest-benchmark.
    """
    figures = []
    try:
        content = json.loads(path.read_text())
        machine = content["machine_info"]
        machine = machine | {"rehearsal": content.get("dry_run", False), "note": content.get("note", "")}
        for benchmark in content["benchmarks"]:
            stats, info = benchmark["stats"], benchmark["extra_info"]
            data = stats.get("data", ())
            fifths = (
                statistics.quantiles(data, n=5, method="inclusive")
                if len(data) > 1
                else (stats["q1"], 0, 0, stats["q3"])
            )
            times = stats["median"], fifths[0], fifths[3]
            figures.append(Figure(shown, content["datetime"], machine, info, *times))
            _ = info["operation"], info["contestant"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{shown}: expected this project's benchmarks by pytest-benchmark, got {error!r}") from error
    return figures


def latest(figures: Iterable[Figure]) -> list[Figure]:
    """Those of the newest record that has their group, so that figures which are compared are of one run."""
    chosen: dict[tuple, list[Figure]] = {}
    for figure in sorted(figures, key=lambda figure: figure.date, reverse=True):
        same = chosen.setdefault(figure.group, [])
        if not same or same[0].path == figure.path:
            same.append(figure)
    return [figure for same in chosen.values() for figure in same]


def grouped(figures: Iterable[Figure]) -> list[dict[str, Figure]]:
    """Contestant -> figure, a group at a time in the order of size, this project's contestants first."""
    groups: dict[tuple, dict[str, Figure]] = {}
    for figure in sorted(figures, key=lambda f: [*OWN, f["contestant"]].index(f["contestant"])):
        groups.setdefault(figure.group, {})[figure["contestant"]] = figure
    return [group for _, group in sorted(groups.items(), key=lambda item: [(str(type(x)), x) for x in item[0]])]


def tables(figures: list[Figure]) -> Iterator[str]:
    """A table an operation: a row a group, a column a contestant."""
    for operation in dict.fromkeys([*TITLES, *(figure["operation"] for figure in figures)]):
        groups = grouped(figure for figure in figures if figure["operation"] == operation)
        names = list(dict.fromkeys(name for group in groups for name in group))
        if groups:
            yield from (f"#### {TITLES.get(operation, operation)}", "")
            yield "| | " + " | ".join(names) + " | % of copy | error |"
            yield "|---" * (len(names) + 3) + "|"
            yield from (_row(group, names) for group in groups)
            yield ""


def _row(group: dict[str, Figure], names: list[str]) -> str:
    """Ours with p20 and p80, percentage and error; beside the others how many times as long they took."""
    ours = next(iter(group.values()))
    cells = [f"{ours['mode']}, {ours['dtype']}, B = {ours['B']}" + f", {ours['cache']}" * (ours["cache"] != "warm")]
    for figure in (group.get(name) for name in names):
        cell = f"{milliseconds(figure.median)} ms" if figure else ""
        if figure is ours:
            cell += f" ({milliseconds(ours.p20)} to {milliseconds(ours.p80)})"
        elif figure:
            cell += f", {ours.slower(figure):.2f} x"
        cells.append(cell + (f", {figure['peak_bytes'] / 2**20:.0f} MiB" if figure and figure["peak_bytes"] else ""))
    percent, error = ours["percent_of_copy"], ours["error"]
    cells += ["" if percent is None else f"{percent:.0f}", "" if error is None else f"{error:.0e}"]
    return "| " + " | ".join(cells) + " |"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def slug(name: str) -> str:
    """For names of folders and files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
