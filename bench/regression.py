"""Whether this project's kernels have become slower than in an earlier record of the same GPU.

    python bench/regression.py OLD.json NEW.json

Both are records of bench/on_gpu.py. A figure is slower where its median exceeds the earlier one by more than 5 %; the
exit code is 1 where one is. Figures that either record lacks, those of other providers and those that depend on the
host's speed (predictor, decoder of one prompt without a graph) are not compared.
"""

import argparse
import json
import sys
from pathlib import Path

LIMIT = 1.05
OWN = ("cuda", "triton", "fused")
BENCHMARKS = ("sampler", "attention", "decoder")  # parts of a record that hold figures
_KEY = ("operation", "provider", "dtype", "B", "T", "C", "H", "W", "max_offset", "mode", "cache")


def medians(record: dict) -> dict[tuple, float]:
    """Microseconds of this project's kernels, by everything that tells one figure from another."""
    figures = [figure for name in BENCHMARKS for figure in (record.get(name) or {}).get("records", ())]
    return {
        tuple(figure.get(name) for name in _KEY): figure["microseconds"]["median"]
        for figure in figures
        if figure["provider"] in OWN and "microseconds" in figure and not figure.get("host_work")
    }


def slower(old: dict, new: dict) -> list[str]:
    """One line for each figure of ``new`` that is slower than in ``old``, the worst first."""
    before, now = medians(old), medians(new)
    ratios = {key: now[key] / before[key] for key in now if key in before}
    return [
        f"{', '.join(str(part) for part in key if part is not None)}: "
        f"{before[key]:.1f} -> {now[key]:.1f} us, {ratio:.2f} x"
        for key, ratio in sorted(ratios.items(), key=lambda item: -item[1])
        if ratio > LIMIT
    ]


def last_record(folder: Path, device: str, but: str) -> Path | None:
    """The latest real run on this device in ``folder``, of another commit than ``but``."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        record = json.loads(path.read_text())
        if record["device"] == device and not record["dry_run"] and record["commit"] != but and medians(record):
            return path
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    if old["device"] != new["device"]:
        parser.error(f"different devices: {old['device']} and {new['device']}")
    lines = slower(old, new)
    print("\n".join(lines) or f"none of {len(medians(new).keys() & medians(old).keys())} common figures is slower")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
