"""Writes docs/results.md and its pictures from study/records and study/commentary.md: `python study/report.py`."""

import json

import numpy as np
from figures import draw_figures
from rows import BASE, FULL, HEADLINE, LONG, SHIPPED, TABLES, Row, Table
from run import RECORDS, STUDY

DOCUMENT = STUDY.parent / "docs" / "results.md"
KINDS = {"gt_box": "GT box", "noisy_box": "noisy box", "1_point": "1 point", "3_points": "3 points"}
PROTOCOL = ("gt_box", "noisy_box", "1_point")
METRICS = ("miou", "mbiou", "st")

Record = dict


def load_records() -> dict[str, list[Record]]:
    """Row name -> its records, one a seed."""
    records: dict[str, list[Record]] = {}
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        records.setdefault(record["row"], []).append(record)
    return records


def figure(records: list[Record], split: str, kind: str, metric: str, group: str = "all") -> np.ndarray:
    """One figure of a row, an entry a seed."""
    return np.array([record["figures"][split]["summary"][kind][group][metric] for record in records])


def evaluated(records: dict[str, list[Record]], row: Row, split: str) -> list[Record]:
    """The records of a row that have figures for a split."""
    return [record for record in records.get(row.name, []) if split in record["figures"]]


def spread(values: np.ndarray, digits: int = 1) -> str:
    """'70.1', or with several seeds '70.1 ± 0.3', the standard deviation."""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def cell(records: list[Record], split: str, kind: str) -> str:
    """'mIoU / mBIoU / ST' of a kind."""
    metrics = METRICS if kind != "gt_box" else METRICS[:2]
    return " / ".join(spread(figure(records, split, kind, metric)) for metric in metrics)


def table_lines(table: Table, records: dict[str, list[Record]], split: str = "val") -> list[str]:
    """A table of Markdown; rows without a record say so."""
    lines = [
        "| | trained | pictures | steps | minutes | seeds | " + " | ".join(KINDS.values()) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(KINDS),
    ]
    for row in table.rows:
        found = evaluated(records, row, split)
        if found:
            cells = [*training_cells(row, found), str(len(found)), *(cell(found, split, kind) for kind in KINDS)]
        else:
            cells = ["not run"] + [""] * (4 + len(KINDS))
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return lines


def training_cells(row: Row, found: list[Record]) -> list[str]:
    """Trained parameters, pictures, steps and minutes."""
    if row.options is None:
        return ["-", "-", "-", "-"]
    trainings = [record["training"] for record in found]
    minutes = np.mean([float(training["minutes"]) for training in trainings])
    first = trainings[0]
    return [f"{first['parameters'] / 1e6:.2f} M", str(first["pictures"]), str(first["steps"]), f"{minutes:.1f}"]


def won_back(base: list[Record], found: list[Record], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Percent of a noisy box's cost in mIoU, and of what its ST lacks to 100, that a row gains; an entry a seed."""
    exact, noisy = (figure(base, split, kind, "miou").mean() for kind in ("gt_box", "noisy_box"))
    back = (figure(found, split, "noisy_box", "miou") - noisy) / (exact - noisy)
    st = figure(base, split, "noisy_box", "st").mean()
    return 100 * back, 100 * (figure(found, split, "noisy_box", "st") - st) / (100 - st)


def won_back_lines(table: Table, records: dict[str, list[Record]], split: str) -> list[str]:
    """Of what the base loses, how much each row of a table wins back; with several seeds mean ± deviation."""
    base = evaluated(records, BASE, split)

    def change(found: list[Record], kind: str) -> float:
        return float(figure(found, split, kind, "miou").mean() - figure(base, split, kind, "miou").mean())

    lines = [
        "| | GT box | noisy box, % won back | ST, % of what it lacks | 1 point |",
        "|---|---|---|---|---|",
    ]
    for row in table.rows:
        found = evaluated(records, row, split)
        if not found or row is BASE:
            continue
        back, steadier = won_back(base, found, split)
        cells = [f"{change(found, 'gt_box'):+.1f}", spread(back, 0), spread(steadier, 0)]
        cells.append(f"{change(found, '1_point'):+.1f}")
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return lines


def protocol_lines(records: dict[str, list[Record]], split: str) -> list[str]:
    """Base and shipped plugin with the paper's 20 prompts a kind, and what the plugin wins back."""
    base, shipped = (evaluated(records, row, f"{split}_protocol") for row in (BASE, SHIPPED))
    if not (base and shipped):
        return ["Not run."]
    lines = ["| | GT box | noisy box | 1 point |", "|---|---|---|---|"]
    for label, found in (("`sam_lite` alone", base), ("with the plugin", shipped)):
        lines.append(f"| {label} | " + " | ".join(cell(found, f"{split}_protocol", kind) for kind in PROTOCOL) + " |")

    back, steadier = (share.mean() for share in won_back(base, shipped, f"{split}_protocol"))
    return [
        *lines,
        "",
        f"Won back: {back:.0f} % of what a noisy box costs, {steadier:.0f} % of what its ST lacks to 100.",
    ]


def routing_lines(records: dict[str, list[Record]]) -> list[str]:
    """alpha_1 by prompt kind."""
    found = records.get(FULL.name, [])
    lines = ["| " + " | ".join(KINDS.values()) + " |", "|" + "---|" * len(KINDS)]
    values = [figure(found, "val", kind, "alpha_1") for kind in KINDS]
    return [
        *lines,
        "| " + " | ".join(f"{value.mean():.3f} ({value.min():.3f} to {value.max():.3f})" for value in values) + " |",
    ]


def set_lines(records: dict[str, list[Record]], split: str) -> list[str]:
    """Base and shipped plugin on each set: mIoU with a GT box, and mIoU and ST with noisy boxes and single points."""
    lines = ["| set | GT box | noisy box | 1 point |", "|---|---|---|---|"]
    rows = [evaluated(records, row, split) for row in (BASE, SHIPPED)]
    groups = [name for name in rows[0][0]["figures"][split]["summary"]["gt_box"] if name not in ("sets", "all")]
    for group in [*groups, "sets", "all"]:
        cells = []
        for kind in ("gt_box", "noisy_box", "1_point"):
            before, after = (
                " / ".join(
                    f"{figure(found, split, kind, metric, group).mean():.1f}"
                    for metric in (("miou",) if kind == "gt_box" else ("miou", "st"))
                )
                for found in rows
            )
            cells.append(f"{before} → {after}")
        name = {"sets": "**mean of sets**", "all": "**mean of pictures**"}.get(group, group)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Fill study/commentary.md's placeholders, `{{name}}` alone on a line."""
    records = load_records()
    parts = {table.name: table_lines(table, records) for table in TABLES}
    for table in (HEADLINE, LONG):
        parts[f"{table.name}_test"] = table_lines(table, records, "test")
        for split in ("val", "test"):
            parts[f"{table.name}_won_back_{split}"] = won_back_lines(table, records, split)
    for split in ("val", "test"):
        parts[f"sets_{split}"] = set_lines(records, split)
        parts[f"protocol_{split}"] = protocol_lines(records, split)
    parts["routing"] = routing_lines(records)
    lines = []
    for line in (STUDY / "commentary.md").read_text().splitlines():
        name = line.removeprefix("{{").removesuffix("}}")
        lines += parts[name] if line == f"{{{{{name}}}}}" else [line]
    DOCUMENT.write_text("\n".join(lines) + "\n")
    draw_figures(records, DOCUMENT.parent / "images")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
