"""Trains and evaluates every row of docs/results.md by the commands that users have, and keeps a record of each.

    python study/run.py --data DATA [--rows stable,dt] [--seeds 0] [--checkpoint BASE] [--work study/work] [--dry-run]

A row that has a record for the same data, commands and base is not run again; one that was cut short continues where it
was. Records: study/records/ROW-SEED.json. Then `python study/report.py` writes docs/results.md. ``--checkpoint`` takes
other weights of `sam_lite` as the base, with a folder of its own in the work folder. A record from before bases were
recorded counts as one of the package's own weights.
"""

import argparse
import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from figures import training_curve
from rows import EXCLUDED, Row, all_rows
from safetensors import safe_open

from stable_sam_cuda.files import save_bytes
from stable_sam_cuda.sam.lite import SHIPPED_CHECKPOINT

STUDY = Path(__file__).parent
RECORDS = STUDY / "records"
COMMON = {"split": "train", "exclude": ",".join(EXCLUDED), "epochs": 1, "occlusions": 100, "amp": "bf16"}
KINDS = "gt_box,noisy_box,1_point,3_points"
PROTOCOL_KINDS = "gt_box,noisy_box,1_point"
EVALUATIONS = {
    "val": {"split": "val", "prompts": KINDS, "draws": 3, "every": 2},
    "test": {"split": "test", "prompts": KINDS, "draws": 3, "every": 2},
    "val_protocol": {"split": "val", "prompts": PROTOCOL_KINDS, "draws": 20, "every": 2},
    "test_protocol": {"split": "test", "prompts": PROTOCOL_KINDS, "draws": 20, "every": 2},
}


def flags(options: dict[str, object]) -> list[str]:
    """{"lr": 0.1, "no-robust": True} -> ["--lr", "0.1", "--no-robust"]."""
    return [
        word
        for name, value in options.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def training_options(row: Row, seed: int) -> dict[str, object]:
    """The options of ``stable-sam train`` for a row."""
    return {**COMMON, **row.options, "seed": seed}


def sha256(path: Path) -> str:
    """Digest of a weights file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def evaluations_of(row: Row, seed: int) -> dict[str, dict[str, object]]:
    """The options of ``stable-sam evaluate``, by the evaluation's name: all but ``val`` for the first seed alone."""
    wanted = {"val"}
    if seed == 0:
        wanted |= {"test"} if row.tested else set()
        wanted |= {"val_protocol", "test_protocol"} if row.protocol else set()
    return {name: options for name, options in EVALUATIONS.items() if name in wanted}


def base_name(checkpoint: Path) -> str:
    """The folder in the work folder of what is trained on a base."""
    return f"base-{sha256(checkpoint)[:12]}"


def is_recorded(path: Path, commands: dict[str, object], checkpoint: Path | None) -> bool:
    """Whether ``path`` is the record of these commands on this base, None being the package's own weights."""
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    if "base_sha256" not in record:
        return record["commands"] == commands and checkpoint is None
    return record["commands"] == commands and record["base_sha256"] == sha256(checkpoint or SHIPPED_CHECKPOINT)


def cache_name(options: dict[str, object]) -> str:
    """The folder of the embeddings of a run with these options; rows on the same pictures share it."""
    return f"embeddings-{options.get('limit', 'all')}-{options['seed'] if 'limit' in options else 0}"


@dataclass
class Study:
    """Where rows are run; ``checkpoint`` are weights of another base than the package's own."""

    data: Path
    work: Path
    device: str = "cpu"
    dry_run: bool = False
    checkpoint: Path | None = None
    records: Path = RECORDS

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            self.work = self.work / base_name(self.checkpoint)

    def verb(self, name: str, options: dict[str, object]) -> None:
        """Run a verb of ``stable-sam``, or show it."""
        base = {} if self.checkpoint is None else {"checkpoint": self.checkpoint}
        words = ["stable_sam_cuda", name, "--data", str(self.data), *flags(options | base), "--device", self.device]
        print("==> stable-sam", shlex.join(words[1:]), flush=True)
        if not self.dry_run:
            subprocess.run([sys.executable, "-m", *words], check=True)

    def run(self, row: Row, seed: int) -> None:
        """Train and evaluate one row with one seed, unless there is a record of just that."""
        path = self.records / f"{row.name}-{seed}.json"
        trained = None if row.options is None else training_options(row, seed)
        evaluations = evaluations_of(row, seed)
        commands = {"train": trained, "evaluate": evaluations}
        if is_recorded(path, commands, self.checkpoint):
            print(f"{row.name}, seed {seed}: recorded", flush=True)
            return
        weights = "none" if trained is None else self.train(row, trained)
        record = {
            "row": row.name,
            "seed": seed,
            "commands": commands,
            "base_sha256": sha256(self.checkpoint or SHIPPED_CHECKPOINT),
            "machine": machine(self.device),
        }
        if trained is not None and not self.dry_run:
            record["training"] = training_record(Path(weights))
            record["curve"] = training_curve(Path(weights).parent / "log.jsonl")
        record["figures"] = {name: self.evaluate(row, seed, weights, name) for name in evaluations}
        if not self.dry_run:
            self.records.mkdir(parents=True, exist_ok=True)
            save_bytes(path, (json.dumps(record, indent=1) + "\n").encode())

    def train(self, row: Row, options: dict[str, object]) -> str:
        """Weights of a run that is finished, continued or begun here."""
        out = self.work / f"{row.name}-{options['seed']}"
        method = options["method"]
        weights = out / ("plugin.safetensors" if method == "stable" else f"{method}.safetensors")
        if not weights.is_file():
            place = {"out": out, "cache": self.work / cache_name(options), "resume": True}
            self.verb("train", {**options, **place})
        return str(weights)

    def evaluate(self, row: Row, seed: int, weights: str, name: str) -> dict:
        """The summary of one evaluation."""
        out = self.work / f"{row.name}-{seed}" / name
        if not (out / "results.json").is_file():
            self.verb("evaluate", {**EVALUATIONS[name], "plugin": weights, "out": out})
        if self.dry_run:
            return {}
        results = json.loads((out / "results.json").read_text())
        return {key: value for key, value in results.items() if key in ("pictures", "draws", "summary")} | {
            "objects": len(results["objects"]) // len(results["summary"])
        }


def machine(device: str) -> str:
    """The processor that does the work, by name."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()


def training_record(weights: Path) -> dict:
    """What a weights file says of its training, and how many parameters it holds."""
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no mapping)
    return {**json.loads(metadata["training"]), "parameters": parameters}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with splits.json and SET/images, SET/masks")
    parser.add_argument("--work", type=Path, default=STUDY / "work", help="folder for embeddings, weights and results")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder for the records")
    parser.add_argument("--checkpoint", type=Path, help="weights of another sam_lite; default: the package's own")
    parser.add_argument("--rows", help="names of rows, by commas; default: all")
    parser.add_argument("--seeds", help="only these seeds, by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run")
    args = parser.parse_args()
    rows = all_rows()
    if args.rows:
        wanted = args.rows.split(",")
        unknown = set(wanted) - {row.name for row in rows}
        if unknown:
            parser.error(
                f"rows: expected some of {', '.join(row.name for row in rows)}, got {', '.join(sorted(unknown))}"
            )
        rows = [row for row in rows if row.name in wanted]
    if args.checkpoint and not args.checkpoint.is_file():
        parser.error(f"checkpoint: expected a sam_lite .safetensors file, got {args.checkpoint}, which does not exist")
    study = Study(args.data, args.work, args.device, args.dry_run, args.checkpoint, args.records)
    turns = [(seed, row) for seed in (0, 1, 2) for row in rows if seed in row.seeds]
    for seed, row in turns:
        if not args.seeds or str(seed) in args.seeds.split(","):
            started = time.monotonic()
            study.run(row, seed)
            print(f"{row.name}, seed {seed}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
