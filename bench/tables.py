"""Figures as Markdown tables. Imports nothing of the package: bench/on_gpu.py runs before that is built."""


def sampler_table(records: list[dict[str, object]]) -> str:
    """Cold figures as a Markdown table, with the ratio to eager."""
    rows = ["| dtype | B | mode | provider | us (p20 to p80) | % of copy | x eager | peak MiB |", "|---" * 8 + "|"]
    cold = [r for r in records if r.get("cache") == "cold"]
    eager = {(r["dtype"], r["B"], r["mode"]): r["microseconds"]["median"] for r in cold if r["provider"] == "eager"}
    for record in cold:
        key, times = (record["dtype"], record["B"], record["mode"]), record["microseconds"]
        ratio = f"{eager[key] / times['median']:.2f}" if key in eager else ""
        peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.0f}"
        spread = f"{times['median']:.1f} ({times['p20']:.1f} to {times['p80']:.1f})"
        cells = [*map(str, key), str(record["provider"]), spread, f"{record['percent_of_copy']:.0f}", ratio, peak]
        rows.append("| " + " | ".join(cells) + " |")
    for record in records:
        if "failed" in record or "skipped" in record:
            reason = record.get("failed") or record.get("skipped")
            rows.append(f"\n{record['provider']}, {record['dtype']}, B = {record['B']}: {reason}")
    return "\n".join(rows)


def attention_table(records: list[dict[str, object]]) -> str:
    """Every figure as a Markdown table; then what there is none of, and why."""
    rows = [
        "| operation | provider | dtype | B | mode | cache | us (p20 to p80) | % of copy | peak MiB |",
        "|---" * 9 + "|",
    ]
    for record in [record for record in records if "microseconds" in record]:
        times, peak = record["microseconds"], record.get("peak_bytes")
        cells = [str(record[name]) for name in ("operation", "provider", "dtype", "B", "mode", "cache")]
        cells.append(f"{times['median']:.1f} ({times['p20']:.1f} to {times['p80']:.1f})")
        cells += [f"{record['percent_of_copy']:.0f}", "" if peak is None else f"{peak / 2**20:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    for record in records:
        reason = record.get("failed") or record.get("skipped")
        if reason:
            names = ", ".join(str(record[name]) for name in ("operation", "provider", "dtype"))
            rows.append(f"\n{names}, B = {record['B']}: {reason}")
    return "\n".join(rows)
