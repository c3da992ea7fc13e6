"""The pictures of docs/results.md."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rows import BASE, BOTH, FULL, HEADLINE

Record = dict
BASELINES = [row for row in HEADLINE.rows if row not in (BASE, FULL, BOTH)]
COLOURS = {BASE.name: "0.6", FULL.name: "yellowgreen", BOTH.name: "darkgreen"} | {
    row.name: plt.get_cmap("Blues")(0.35 + 0.15 * place) for place, row in enumerate(BASELINES)
}


def draw_figures(records: dict[str, list[Record]], folder: Path) -> None:
    """results_prompts.png: mIoU and ST by prompt kind; results_training.png: loss and IoU while training."""
    folder.mkdir(parents=True, exist_ok=True)
    _draw_kinds(records, folder / "results_prompts.png")
    _draw_training(records, folder / "results_training.png")


def _draw_kinds(records: dict[str, list[Record]], path: Path) -> None:
    kinds = {"gt_box": "GT box", "noisy_box": "noisy box", "1_point": "1 point", "3_points": "3 points"}
    rows = [row for row in HEADLINE.rows if row.name in records]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for axis, metric, title in ((axes[0], "miou", "mIoU, %"), (axes[1], "st", "stability ST, %")):
        shown = [kind for kind in kinds if not (metric == "st" and kind == "gt_box")]
        width = 0.8 / len(rows)
        for place, row in enumerate(rows):
            values = np.array(
                [[r["figures"]["val"]["summary"][kind]["all"][metric] for kind in shown] for r in records[row.name]]
            )
            x = np.arange(len(shown)) + (place - (len(rows) - 1) / 2) * width
            error = values.std(0, ddof=1) if len(values) > 1 else None
            axis.bar(x, values.mean(0), width, yerr=error, color=COLOURS[row.name], label=row.label.replace("`", ""))
        axis.set_xticks(range(len(shown)), [kinds[kind] for kind in shown])
        axis.set_title(title)
        axis.set_ylim(bottom=40)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_training(records: dict[str, list[Record]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    for row in HEADLINE.rows:
        curves = [record["curve"] for record in records.get(row.name, []) if record.get("curve")]
        if not curves:
            continue
        for axis, key in ((axes[0], "loss"), (axes[1], "iou")):
            axis.plot(
                curves[0]["step"], curves[0][key], label=row.label.replace("`", ""), color=COLOURS[row.name], lw=1.2
            )
    for axis, title in ((axes[0], "loss"), (axes[1], "IoU with training masks")):
        axis.set_title(f"{title}, running mean")
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def training_curve(log: Path, points: int = 60, decay: float = 0.95) -> dict[str, list[float]]:
    """Running means of loss and IoU from a run's log.jsonl, at so many steps at most."""
    steps, loss, iou = [], [], []
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["loss"] is None:  # no object was large enough
            continue
        if steps and entry["step"] <= steps[-1]:  # a run that was killed repeats the steps after its last checkpoint
            keep = next(index for index, step in enumerate(steps) if step >= entry["step"])
            del steps[keep:], loss[keep:], iou[keep:]
        for curve, value in ((loss, entry["loss"]), (iou, entry["iou"])):
            curve.append(decay * curve[-1] + (1 - decay) * value if curve else value)
        steps.append(entry["step"])
    chosen = (
        sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(points, len(steps)))}) if steps else []
    )
    return {
        "step": [steps[i] for i in chosen],
        "loss": [round(loss[i], 4) for i in chosen],
        "iou": [round(iou[i], 4) for i in chosen],
    }


def draw_base_training(log: Path, path: Path) -> None:
    """Loss and IoU of the base's training by the minute, and its validation by prompt kind."""
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    steps = [entry for entry in entries if entry.get("loss") is not None]
    validations = [entry for entry in entries if entry.get("val")]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    axes[0].plot([entry["minutes"] for entry in steps], [entry["loss"] for entry in steps])
    axes[1].plot(
        [entry["minutes"] for entry in steps], [entry["iou"] for entry in steps], color="0.6", label="training"
    )
    for kind in validations[-1]["val"] if validations else ():
        shown = [(entry["minutes"], entry["val"][kind]) for entry in validations]
        axes[1].plot(*zip(*shown, strict=True), marker="o", ms=3, label=kind)
    for axis, title in ((axes[0], "loss"), (axes[1], "IoU")):
        axis.set_title(f"{title}, by minutes")
        axis.spines[["top", "right"]].set_visible(False)
    if axes[1].lines:
        axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
