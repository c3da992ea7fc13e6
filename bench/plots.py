"""The pictures of docs/performance.md, all from records under bench/results/."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Record = dict
Curves = dict[str, dict[int, float]]  # contestant -> prompts -> milliseconds

ROOFLINE_SIZE = {"dtype": "bfloat16", "B": 64, "cache": "cold"}
OWN_COLOUR = "tab:green"
COLOURS = {"eager": "0.5", "torch.compile": "tab:orange", "deform_conv2d": "tab:brown", "sdpa": "tab:purple"}
COLOURS |= {"triton": "tab:olive"}
MARKERS = {"deformable_sample": "o", "layer": "s", "attention": "D", "offset_head": "^", "plain": "P"}


def figures_of(record: Record, parts: Iterable[str]) -> list[Record]:
    return [f for part in parts for f in (record.get(part) or {}).get("records", ()) if "microseconds" in f]


def draw_roofline(record: Record, path: Path) -> bool:
    """FLOP a second over FLOP a byte, 64 prompts in bfloat16, under this run's two ceilings; False without a figure."""
    figures = [f for f in figures_of(record, ("sampler", "attention")) if "flops" in f]
    figures = [f for f in figures if all(f[name] == value for name, value in ROOFLINE_SIZE.items())]
    if not figures:
        return False
    part = next(record[name] for name in ("sampler", "attention") if record.get(name))
    copy, matmul = part["copy_gb_per_s"] / 1e3, part["matmul_tflop_per_s"]  # TB/s, TFLOP/s
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    intensities = [0.5, matmul / copy, max(2 * matmul / copy, 500)]
    axes.loglog(intensities, [min(copy * x, matmul) for x in intensities], color="black", label="copy, bf16 product")
    for one in figures:
        rate = one["flops"] / (one["microseconds"]["median"] * 1e-6) / 1e12
        backward = one["mode"] == "backward"
        colour = COLOURS.get(one["provider"], OWN_COLOUR)
        axes.plot(
            one["flops"] / one["ideal_bytes"],
            rate,
            MARKERS.get(one["operation"], "x"),
            color=colour,
            markerfacecolor="none" if backward else colour,
            label=f"{one['operation']}, {one['provider']}, {one['mode']}",
        )
    axes.set(xlabel="FLOP a byte, fewest of each", ylabel="TFLOP/s", title=f"{record['device']}, bfloat16, 64 prompts")
    figure.legend(loc="outside right upper", fontsize=7)
    _save(figure, path)
    return True


def draw_times(record: Record, path: Path) -> bool:
    """Forward times over the number of prompts, bfloat16, cold cache; False without a figure."""
    panels = {
        "sampler": ("sampler", ("deformable_sample",)),
        "plugin and attention; plain SAM's": ("attention", ("layer", "plain")),
        "mask decoder": ("decoder", ("decoder",)),
    }
    curves: dict[str, Curves] = {}
    for title, (part, operations) in panels.items():
        for one in figures_of(record, (part,)):
            kind = (one["operation"], one["dtype"], one["mode"], one["cache"])
            if kind in [(operation, "bfloat16", "forward", "cold") for operation in operations]:
                name = f"plain, {one['provider']}" if one["operation"] == "plain" else one["provider"]
                points = curves.setdefault(title, {}).setdefault(name, {})
                points[one["B"]] = one["microseconds"]["median"] / 1e3
    return _draw_panels(curves, f"{record['device']}, bfloat16, forward", path)


def draw_cpu(curves: dict[str, Curves], path: Path) -> bool:
    """Times over the number of prompts, a panel an operation; False without a curve."""
    return _draw_panels(curves, "CPU, float32", path)


def _draw_panels(curves: dict[str, Curves], title: str, path: Path) -> bool:
    if not curves:
        return False
    figure, all_axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.8), squeeze=False, layout="constrained")
    for axes, (panel, contestants) in zip(all_axes[0], curves.items(), strict=True):
        _draw_curves(axes, contestants)
        axes.set_title(panel, fontsize=8)
        axes.set(xlabel="prompts", ylabel="ms")
    figure.suptitle(title)
    _save(figure, path)
    return True


def _draw_curves(axes: Axes, contestants: Curves) -> None:
    batches = sorted({batch for points in contestants.values() for batch in points})
    for name, points in contestants.items():
        axes.loglog(*zip(*sorted(points.items()), strict=True), "o-", label=name)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.legend(fontsize=7)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and version that a picture would differ by each time.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
