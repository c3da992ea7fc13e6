"""Results as the paper's tables, as CSV and as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from stable_sam_cuda.evaluation.protocol import ObjectResult, summarize
from stable_sam_cuda.sam.atomic_file import atomic_write


def paper_table(results: Sequence[ObjectResult], title: str) -> Table:
    """mIoU / mBIoU / ST in percent, a row a set, a column a prompt kind; the last two rows are the means."""
    summary = summarize(results)
    table = Table("set", *summary, title=title, caption="mIoU / mBIoU / ST")
    for name in next(iter(summary.values()), {}):
        if name == "sets":
            table.add_section()
        label = {"sets": "mean of sets", "all": "mean of pictures"}.get(name, name)
        cells = [values[name] for values in summary.values()]
        table.add_row(label, *(f"{cell['miou']:.1f} / {cell['mbiou']:.1f} / {cell['st']:.1f}" for cell in cells))
    return table


def precision_table(precisions: dict[str, dict[str, dict[str, float]]]) -> Table:
    """COCO's average precision in percent: a row a prompt kind and score, a column a statistic."""
    first = next(iter(precisions.values()))
    table = Table("boxes", "score", *first["score_1"], title="COCO average precision of the masks")
    for kind, by_score in precisions.items():
        for score, values in by_score.items():
            table.add_row(kind, score, *(f"{value:.1f}" for value in values.values()))
    return table


def write_report(results: Sequence[ObjectResult], folder: Path, description: dict[str, Any]) -> None:
    """``results.json`` (description, summary, every object) and ``results.csv`` (every object) in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    document = {**description, "summary": summarize(results), "objects": rows}
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ObjectResult)])
    writer.writeheader()
    writer.writerows(rows)
    for name, content in (("results.json", json.dumps(document, indent=1)), ("results.csv", text.getvalue())):
        with atomic_write(folder / name) as file:
            file.write(content.encode())
