"""Writes docs/performance.md and its pictures from the records under bench/results/: `python bench/report.py`.

python bench/report.py [--results bench/results] [--document docs/performance.md]
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from plots import Curves, draw_cpu, draw_roofline, draw_times
from regression import BENCHMARKS, medians
from tables import ceilings, figures_table
from targets import CPU, GPU, RATIOS, Reading, Record, Target, kind_of

ROOT = Path(__file__).resolve().parents[1]
NOT_ON_GPU = "not measured on a GPU yet"
NO_RECORD = "no record"
TITLES = {
    "sampler": "Sampler",
    "attention": "Plugin and attention",
    "decoder": "Decoder and predictor",
    "picture": "A picture",
}
PANELS = {"sampler": "sampler", "attention": "plugin and attention", "decoder": "decoder"}  # of the plot
RATIO_HEADS = {
    "sampler": "x this project's time",
    "attention": "x the fused time",
    "decoder": "x SAM's time",
    "picture": "x SAM's time",
}

INTRODUCTION = """# Performance

Written by `make performance` from the records under `bench/results/`; change those, not this page.
"""
NO_GPU = """**Nothing on this page was measured on a GPU: no kernel of this project has run on one yet.**
`bench/QUEUE.md` has what waits for one, the command that measures it, and what is expected.
"""
METHOD = """## How it is measured

Every result is compared with plain PyTorch in float64 before it is timed; a contestant that is wrong gets no time.
Inputs are random. On a GPU: results over memory that was filled with NaN; CUDA events, median with p20 and p80, cold
(the second-level cache overwritten before each run) and warm, with one prompt also as a CUDA graph; percentages are of
a large copy and of a large bfloat16 matrix product in the same run; peak memory is what one call adds. On a CPU
contestants take turns, so that a disturbance hits all of them, and the ratio is the figure that counts: the median over
rounds.

The eager chain is what one writes in PyTorch without this package: `grid_sample`, two blends, and SAM's attention.
Sizes are SAM's: 256 channels, 64 x 64, 8 heads. A commit with a + had changes that were not committed.
"""


def load(results: Path) -> tuple[list[Record], list[Record]]:
    """Records of GPUs, the latest of each device; records of CPUs, the latest first. Each with its ``path``."""
    gpu: dict[str, Record] = {}
    cpu = []
    for path in sorted(results.glob("*/*.json"), key=lambda path: path.name):
        record = json.loads(path.read_text()) | {"path": f"bench/results/{path.relative_to(results).as_posix()}"}
        if path.parent.name == "cpu":
            cpu.append(record)
        elif "parts" in record and not record["dry_run"] and medians(record):
            gpu[record["device"]] = record
    return list(gpu.values()), sorted(cpu, key=lambda record: record["date"], reverse=True)


def targets_table(targets: tuple[Target, ...], records: list[Record], missing: str) -> Iterator[str]:
    """Every target beside what was measured; the worst of several sizes counts."""
    yield "| what | against | target | measured | |"
    yield "|---|---|---|---|---|"
    for target in targets:
        readings = target.readings(records)
        measured, outcome = verdict(target, readings, missing)
        yield f"| {target.what} | {target.against} | {target.asked} | {measured} | {outcome} |"


def verdict(target: Target, readings: list[Reading], missing: str) -> tuple[str, str]:
    """The worst reading and where it was taken; whether the target is passed."""
    if not readings:
        return missing, ""
    worst, wanted = target.worst(readings), len(target.comparisons)
    several = "" if wanted == 1 else f", the worst of {len(readings)}"
    measured = f"{worst.value:.3g} {target.unit} ({worst.where}{several})"
    if not target.holds(worst):
        return measured, "**missed**"
    return measured, "passed" if len(readings) == wanted else f"open: {len(readings)} of {wanted} sizes measured"


def cpu_section(record: Record) -> Iterator[str]:
    """One CPU record: where it comes from, and all of its figures."""
    kind = kind_of(record)
    yield f"### {TITLES[kind]}, {record['date'][:10]}"
    yield ""
    yield (
        f"`{record['path']}`: commit {record['commit']}, {record['cpu']}, "
        f"{record['device']}, {record['instruction_set']}, torch {record['torch']}, {record['compiler']}, load average "
        f"before it {record['load_average'][0]:.1f}."
    )
    yield ""
    yield f"| prompts | | contestant | ms (p20 to p80) | {RATIO_HEADS[kind]} | peak MiB | error |"
    yield "|---|---|---|---|---|---|---|"
    for result in record["results"]:
        what = result.get("mode") or result.get("what") or f"{result['tokens']} tokens"
        median, p20, p80 = (milliseconds(result[f"{name}_ms"]) for name in ("median", "p20", "p80"))
        times = f"{median} ({p20} to {p80})"
        peak = result.get("peak_bytes")
        error = f"{result['error']:.0e}" if "error" in result else ""
        cells = [str(prompts(result)), what, result["contestant"], times, f"{result[RATIOS[kind]]:.2f}"]
        yield "| " + " | ".join([*cells, "" if peak is None else f"{peak / 2**20:.1f}", error]) + " |"
    yield ""


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def prompts(result: Record) -> int:
    return result["prompts"] if "prompts" in result else int(re.match(r"B=(\d+) ", result["shape"])[1])


def cpu_curves(records: list[Record]) -> dict[str, Curves]:
    """A panel a kind, forward, from the latest record of it that has more than one number of prompts."""
    panels: dict[str, tuple[str, Curves]] = {}
    for record in records:
        kind, curves = kind_of(record), {}
        if kind not in PANELS:
            continue
        for result in record["results"]:
            if result.get("mode", "forward") == "forward" and result.get("what", "decoder") == "decoder":
                curves.setdefault(result["contestant"], {})[prompts(result)] = result["median_ms"]
        if max(map(len, curves.values())) > 1:
            panels.setdefault(kind, (f"{PANELS[kind]} ({record['device']}, {record['instruction_set']})", curves))
    return dict(panels.values())


def gpu_section(record: Record, images: Path) -> Iterator[str]:
    """One GPU record: its pictures, and all of its figures."""
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    yield f"### {record['device']}, {record['date']}"
    yield ""
    yield f"`{record['path']}`: commit {record['commit']}."
    yield ""
    for kind, draw in {"roofline": draw_roofline, "time against the number of prompts": draw_times}.items():
        path = images / f"performance_{slug}_{kind.split()[0]}.png"
        if draw(record, path):
            yield f"![{record['device']}: {kind}](images/{path.name})"
        else:
            yield f"No plot ({kind}): the record has no figure for it."
        yield ""
    for name in BENCHMARKS:
        if record.get(name):
            facts = {key: value for key, value in record[name]["machine"].items() if key != "commit"}
            yield f"#### {name}"
            yield ""
            yield ceilings(record[name])
            yield ", ".join(f"{key} {value}" for key, value in facts.items()) + "."
            yield ""
            yield figures_table(record[name]["records"])
            yield ""


def page(results: Path, images: Path) -> Iterator[str]:
    """The document's lines; draws its pictures into ``images``."""
    gpu, cpu = load(results)
    yield INTRODUCTION
    if not gpu:
        yield NO_GPU
    yield "## Targets on a GPU"
    yield ""
    yield "Set for one NVIDIA H200; each is a floor to pass."
    yield ""
    for record in gpu:
        yield f"{record['device']}, `{record['path']}`:"
        yield ""
        yield from targets_table(GPU, [record], "not in this record")
        yield ""
    if not gpu:
        yield from targets_table(GPU, [], NOT_ON_GPU)
        yield ""
    yield "## Targets on a CPU"
    yield ""
    yield "Set for two cores and float32. Measured: the latest record that has the figure."
    yield ""
    yield from targets_table(CPU, cpu, NO_RECORD)
    yield ""
    yield METHOD
    yield "## Figures on a GPU"
    yield ""
    for record in gpu:
        yield from gpu_section(record, images)
    if not gpu:
        yield "No record, and so no roofline and no plot of time against the number of prompts."
        yield ""
    yield "## Figures on a CPU"
    yield ""
    if draw_cpu(cpu_curves(cpu), images / "performance_cpu.png"):
        yield "![Time against the number of prompts on a CPU](images/performance_cpu.png)"
        yield ""
    for record in cpu:
        yield from cpu_section(record)


def write(results: Path, document: Path) -> None:
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n".join(page(results, document.parent / "images")).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    write(options.results, options.document)


if __name__ == "__main__":
    main()
