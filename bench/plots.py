"""The pictures of docs/performance.md, all from records under bench/results/."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from records import Figure, grouped

PANELS = {"deformable_sample": "sampler", "layer": "plugin and attention", "decoder": "mask decoder"}
COLOURS = {"eager": "0.5", "plain": "tab:blue", "plain, sdpa": "tab:purple", "deformops": "tab:red"}
COLOURS |= {"compile": "tab:orange", "deform_conv2d": "tab:brown", "triton": "tab:olive"}
MARKERS = {"deformable_sample": "o", "layer": "s", "deformable_attention": "D", "offset_head": "^"}


def draw_roofline(figures: list[Figure], title: str, path: Path) -> bool:
    """FLOP a second over FLOP a byte on a GPU, 64 prompts in bfloat16, under the run's ceilings; False without any."""
    size, needed = ("bfloat16", 64, "cold"), ("ideal_bytes", "percent_of_matmul")
    shown = [f for f in figures if (f["dtype"], f["B"], f["cache"]) == size and all(f[name] for name in needed)]
    if not shown:
        return False
    copy, matmul = shown[0].machine["copy_gb_per_s"] / 1e3, shown[0].machine["matmul_tflop_per_s"]  # TB/s, TFLOP/s
    drawing, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    intensities = [0.5, matmul / copy, max(2 * matmul / copy, 500)]
    axes.loglog(intensities, [min(copy * x, matmul) for x in intensities], color="black", label="copy, bf16 product")
    for figure in shown:
        rate = figure["percent_of_matmul"] / 100 * matmul
        intensity = rate * 1e12 * figure.median / figure["ideal_bytes"]
        colour = COLOURS.get(figure["contestant"], "tab:green")
        style = {"color": colour, "markerfacecolor": colour if figure["mode"] == "forward" else "none"}
        label = f"{figure['operation']}, {figure['contestant']}, {figure['mode']}"
        axes.plot(intensity, rate, MARKERS.get(figure["operation"], "x"), label=label, **style)
    axes.set(xlabel="FLOP a byte, fewest of each", ylabel="TFLOP/s", title=f"{title}, bfloat16, 64 prompts")
    drawing.legend(loc="outside right upper", fontsize=7)
    _save(drawing, path)
    return True


def draw_times(figures: list[Figure], title: str, path: Path) -> bool:
    """Forward times over the number of prompts, bfloat16 and cold on a GPU; False without two numbers of prompts."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for group in grouped(figures):
        for name, figure in group.items():
            kind = ("bfloat16", "cold") if figure.is_gpu else ("float32", "warm")
            if (figure["mode"], figure["dtype"], figure["cache"]) == ("forward", *kind):
                curves = panels.setdefault(figure["operation"], {})
                curves.setdefault(name, {})[figure["B"]] = 1e3 * figure.median
    shown = {name: panels[name] for name in PANELS if max(map(len, panels.get(name, {}).values()), default=0) > 1}
    if not shown:
        return False
    drawing, all_axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.8), squeeze=False, layout="constrained")
    for axes, (operation, curves) in zip(all_axes[0], shown.items(), strict=True):
        for name, points in curves.items():
            axes.loglog(*zip(*sorted(points.items()), strict=True), "o-", label=name)
        batches = sorted({batch for points in curves.values() for batch in points})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.legend(fontsize=7)
        axes.set(title=PANELS[operation], xlabel="prompts", ylabel="ms")
    drawing.suptitle(f"{title}, forward", fontsize=9)
    _save(drawing, path)
    return True


def _save(drawing: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and version that a picture would differ by each time.
    drawing.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(drawing)
