"""Results as the paper's tables, as CSV and as JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from stable_sam_cuda.evaluation.protocol import ObjectResult, summarize
from stable_sam_cuda.files import atomic_write
from stable_sam_cuda.notes import printable


def paper_table(results: Sequence[ObjectResult], title: str) -> Table:
    """mIoU / mBIoU / ST in percent, a row a set, a column a prompt kind; the last two rows are the means."""
    summary = summarize(results)
    table = Table("set", *summary, title=Text(printable(title)), caption="mIoU / mBIoU / ST")
    for name in next(iter(summary.values()), {}):
        if name == "sets":
            table.add_section()
        label = {"sets": "mean of sets", "all": "mean of pictures"}.get(name, name)
        cells = [values[name] for values in summary.values()]
        figures = (f"{cell['miou']:.1f} / {cell['mbiou']:.1f} / {cell['st']:.1f}" for cell in cells)
        table.add_row(Text(printable(label)), *figures)  # a set's name may hold what rich takes for markup
    return table


def precision_table(precisions: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Table:
    """COCO's average precision in percent: a row a prompt kind and score, a column a statistic, "-" where none is."""
    first = next(iter(precisions.values()))
    table = Table("boxes", "score", *first["score_1"], title="COCO average precision of the masks")
    for kind, by_score in precisions.items():
        for score, values in by_score.items():
            row = ("-" if value is None or math.isnan(value) else f"{value:.1f}" for value in values.values())
            table.add_row(kind, score, *row)
    return table


def results_document(results: Sequence[ObjectResult], description: Mapping[str, Any]) -> dict[str, Any]:
    """Description, summary and every object, as JSON can hold them: NaN and infinity are None."""
    rows = [asdict(result) | _names(result) for result in results]
    return _without_nan({**description, "summary": summarize(results), "objects": rows})


def results_csv(results: Sequence[ObjectResult]) -> str:
    """A row an object and prompt kind, under the names of `ObjectResult`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ObjectResult)])
    writer.writeheader()
    writer.writerows(asdict(result) | _names(result) for result in results)
    return text.getvalue()


def write_report(results: Sequence[ObjectResult], folder: Path, description: Mapping[str, Any]) -> None:
    """``results.json`` (description, summary, every object) and ``results.csv`` (every object) in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(results_document(results, description), indent=1, allow_nan=False)
    for name, content in (("results.json", document), ("results.csv", results_csv(results))):
        with atomic_write(folder / name) as file:
            file.write(content.encode())


def _names(result: ObjectResult) -> dict[str, str]:
    """Names of files, which need not be UTF-8, as text."""
    return {"set_name": printable(result.set_name), "picture": printable(result.picture)}


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {printable(name): _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
