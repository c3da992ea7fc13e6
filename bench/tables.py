"""Figures as Markdown tables. Imports nothing of the package: bench/on_gpu.py runs before that is built."""

BASELINES = ("eager", "sam")  # providers that others of the same operation are compared with
_SAME = ("operation", "dtype", "B", "mode", "cache")


def figures_table(records: list[dict[str, object]]) -> str:
    """Every figure of a benchmark, beside its ratio to the baseline; then what there is none of, and why."""
    rows = [
        "| operation | provider | dtype | B | mode | cache | us (p20 to p80) | % of copy | % of matmul | x as fast "
        "| peak MiB |",
        "|---" * 11 + "|",
    ]
    figures = [record for record in records if "microseconds" in record]
    baselines = {same(r): r["microseconds"]["median"] for r in figures if r["provider"] in BASELINES}
    for record in figures:
        times, peak, key = record["microseconds"], record.get("peak_bytes"), same(record)
        cells = [str(record[name]) for name in ("operation", "provider", "dtype", "B", "mode", "cache")]
        cells.append(f"{times['median']:.1f} ({times['p20']:.1f} to {times['p80']:.1f})")
        cells += [percentage(record, "percent_of_copy"), percentage(record, "percent_of_matmul")]
        cells.append(f"{baselines[key] / times['median']:.2f}" if key in baselines else "")
        cells.append("" if peak is None else f"{peak / 2**20:.0f}")
        rows.append("| " + " | ".join(cells) + " |")
    for record in records:
        reason = record.get("failed") or record.get("skipped")
        if reason:
            names = ", ".join(str(record[name]) for name in ("operation", "provider", "dtype"))
            rows.append(f"\n{names}, B = {record['B']}: {reason}")
    return "\n".join(rows)


def ceilings(benchmark: dict[str, object]) -> str:
    """The rates that a benchmark's percentages are of, as a sentence."""
    copy, matmul = benchmark["copy_gb_per_s"], benchmark["matmul_tflop_per_s"]
    return (
        f"In the same run a large copy moved {copy:.0f} GB/s, read and written, and a large bfloat16 matrix product "
        f"ran at {matmul:.1f} TFLOP/s."
    )


def same(record: dict[str, object]) -> tuple[object, ...]:
    """What two providers' figures must have in common to be compared."""
    return tuple(record.get(name) for name in _SAME)


def percentage(record: dict[str, object], name: str) -> str:
    return f"{record[name]:.0f}" if name in record else ""
