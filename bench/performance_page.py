"""Writes docs/performance.md and its pictures from the records under bench/results/: `make performance`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from plots import draw_roofline, draw_times
from records import Figure, latest, read, slug, tables
from targets import CPU, GPU, Target

ROOT = Path(__file__).resolve().parents[1]
FACTS = {True: ("torch", "triton", "cuda", "python", "multiprocessors", "l2_bytes", "allow_tf32")}  # on a GPU
FACTS[False] = ("torch", "python", "compiler")
INTRODUCTION = """# Performance

`make performance` writes this page from the records under `bench/results/`, which `make bench` makes.
"""
NO_GPU = """**Nothing on this page was measured on a GPU: no kernel of this project has run on one yet.**
`bench/QUEUE.md` has what waits for one, the command that measures it, and what is expected.
"""
METHOD = """## How it is measured

`pytest bench --benchmark-only` compares every result with plain PyTorch in float64 before it times it; a contestant
that is wrong gets no time. Inputs are random. Contestants of a row take turns, so that a disturbance hits all of them,
and their ratio is the figure that counts: the median over rounds. On a GPU results lie over memory that was filled with
NaN, and CUDA events take the time: cold (the second-level cache is overwritten before each run), warm (in the records
alone), and with one prompt the forward also as a CUDA graph. Percentages are of a large copy in the same run, on the
fewest bytes that the operation must move. Peak memory is what one call adds.

The first contestant of a row is this project's: its median with p20 and p80, its percentage of the copy (over 100 where
one prompt lies in the cache), its error. Every other one has its time and that time as a multiple of ours. The eager
chain is what one writes in PyTorch without this package: `grid_sample`, two blends, and SAM's attention. Sizes are
SAM's: 256 channels, 64 x 64, 8 heads. A commit with a + had changes that were not committed.
"""


def load(results: Path) -> list[Figure]:
    """All figures under ``results``; files that are no record of pytest-benchmark's are named on stderr."""
    figures = []
    for path in sorted({*results.glob("*/*.json")} - {*results.glob("compile/*")}):
        try:
            figures += read(path, f"bench/results/{path.relative_to(results).as_posix()}")
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    return latest(figure for figure in figures if not figure.machine["rehearsal"])


def targets_table(targets: tuple[Target, ...], figures: list[Figure], missing: str) -> Iterator[str]:
    """Every target beside what was measured."""
    yield from ("| what | against | target | measured | |", "|---|---|---|---|---|")
    for target in targets:
        measured, outcome = target.outcome(figures, missing)
        yield f"| {target.what} | {target.against} | {target.asked} | {measured} | {outcome} |"
    yield ""


def where_from(figure: Figure) -> str:
    """A figure's record, with the machine's state and the ceilings of that run."""
    machine = figure.machine
    facts = [f"{name} {machine[name]}" for name in FACTS[figure.is_gpu] if machine.get(name) is not None]
    if not figure.is_gpu:
        facts.append(f"load average {machine['load_average'][0]:.1f}")
    return (
        f"`{figure.path}`, {figure.date[:10]}, commit {machine['commit']}: {', '.join(facts)}. A large copy moved "
        f"{machine['copy_gb_per_s']:.0f} GB/s, read and written; a large matrix product ran at "
        f"{machine['matmul_tflop_per_s']:.3g} TFLOP/s." + (f" **{machine['note']}**" if machine.get("note") else "")
    )


def machine_section(name: str, figures: list[Figure], images: Path) -> Iterator[str]:
    """All figures of one machine; draws its pictures."""
    yield from (f"### {name}", "")
    for line in dict.fromkeys(map(where_from, figures)):
        yield from (line, "")
    for kind, draw in {"times": draw_times, "roofline": draw_roofline}.items():
        path = images / f"performance_{slug(name)}_{kind}.png"
        if draw(figures, name, path):
            yield from (f"![{name}: {kind}](images/{path.name})", "")
    yield from tables([figure for figure in figures if not figure.is_gpu or figure["cache"] != "warm"])


def page(results: Path, images: Path) -> Iterator[str]:
    """The document's lines; draws its pictures into ``images``."""
    machines: dict[bool, dict[str, list[Figure]]] = {True: {}, False: {}}  # on a GPU -> name -> figures
    for figure in load(results):
        machines[figure.is_gpu].setdefault(figure.machine_name, []).append(figure)
    yield from (INTRODUCTION, *([] if machines[True] else [NO_GPU]))
    yield from ("## Targets on a GPU", "", "Set for one NVIDIA H200; each is the least that is asked.", "")
    for name, figures in machines[True].items():
        yield from (f"{name}:", "", *targets_table(GPU, figures, "not measured on this GPU yet"))
    if not machines[True]:
        yield from targets_table(GPU, [], "not measured on a GPU yet")
    yield from ("## Targets on a CPU", "", "Set for two cores and float32.", "")
    for name, figures in (machines[False] or {"No machine yet": []}).items():
        yield from (f"{name}:", "", *targets_table(CPU, figures, "no record"))
    yield METHOD
    for kind in ("GPU", "CPU"):
        yield from (f"## Figures on a {kind}", "")
        for name, figures in machines[kind == "GPU"].items():
            yield from machine_section(name, figures, images)
        if not machines[kind == "GPU"]:
            yield from ("There is no record, and so no figure and no plot.", "")


def write(results: Path, document: Path) -> None:
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n".join(page(results, document.parent / "images")).rstrip() + "\n")


if __name__ == "__main__":
    write(ROOT / "bench" / "results", ROOT / "docs" / "performance.md")
