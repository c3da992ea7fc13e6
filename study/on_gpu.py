"""Trains the base model, and on it the plugin and the rows of the study, on a CUDA machine; study/on_gpu.sh runs it.

    OUT=results study/on_gpu.sh --packs packs --base-minutes 10 [--seconds 560] [--carried results] [--dry-run]

In one call of at most ``--seconds``: unpack the pictures, train the base over ``--base-minutes`` in all, then run the
rows, most valuable first, several at once. What a call did not get to, the same command goes on with; on another
machine with ``--carried`` and what the last call left in $OUT:
    sam_lite.safetensors   the base, averaged weights in float16
    results.tar            log, TensorBoard folder and curves of the base, plugins, records of the rows, all output
    on_gpu.json            what was done and what was not
    part-NN.tar and .json  while the base is unfinished: what its training goes on from
Files are few and none is larger than 16 MiB, for machines that give back no more. ``--dry-run`` rehearses two calls on
the CPU with drawn pictures, the second one as if on another machine.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import torch
from figures import draw_base_training
from handover import read_handover, remove_handover, write_base, write_handover
from pack import pack, unpack
from pack_parts import check_members, read_tar, write_tar
from rehearsal import IMAGE_SIZE, draw_data, write_untrained
from rounds import Turn, run_turns
from rows import FULL, HEADLINE, SHIPPED, Row, all_rows
from run import base_name, cache_name, machine, training_options

from stable_sam_cuda import backends
from stable_sam_cuda.files import save_bytes

ROOT = Path(__file__).resolve().parents[1]
BASE_FILE, RESULTS, RECORD = "sam_lite.safetensors", "results.tar", "on_gpu.json"
PART_BYTES = 15 * 2**20 + 2**19
STARTING_SECONDS = 30  # until the base's training has begun; its own clock starts then
CLOSING_SECONDS = 20  # for what is written at the end of a call
FIRST_ROWS = (HEADLINE.rows[0], FULL, SHIPPED)


@dataclass
class Call:
    """One call: folders, how long, and what to train."""

    out: Path
    work: Path
    packs: Path
    seconds: float
    base_minutes: float
    base_options: list[str]
    carried: Path | None = None
    base_seconds: float | None = None  # of this call at most
    rows: str | None = None
    jobs: int = 4
    device: str = "cuda"
    dry: bool = False

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds - CLOSING_SECONDS
        self.base, self.data, self.records = self.work / "base", self.work / "data", self.work / "records"
        self.log = self.work / "on_gpu.log"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def base_is_finished(self) -> bool:
        return (self.base / "run.json").is_file()

    def start(self, words: list[str], threads: int) -> subprocess.Popen:
        """A Python process in a session of its own, its output in the log."""
        with self.log.open("a") as log:
            print(f"\n===== {shlex.join(words)}", file=log, flush=True)
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
            return subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def restore(call: Call) -> None:
    """Continue from what a call on another machine left, where this machine knows nothing of it."""
    checkpoint_file = call.base / "checkpoint.pt"
    if call.carried is None or call.base_is_finished or checkpoint_file.is_file():
        return
    if not (call.carried / RESULTS).is_file():
        raise ValueError(f"carried: expected a folder with {RESULTS}, got {call.carried}")
    check_members(call.carried / RESULTS)
    members = dict(read_tar(call.carried / RESULTS))
    finished = members.pop("base/run.json", None)
    for name, content in members.items():
        path = call.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    save_bytes(call.work / BASE_FILE, (call.carried / BASE_FILE).read_bytes())
    # Last what tells that all the rest is there.
    if finished is not None:
        save_bytes(call.base / "run.json", finished)
        return
    buffer = BytesIO()
    torch.save(read_handover(call.carried, call.work / BASE_FILE), buffer)
    save_bytes(checkpoint_file, buffer.getbuffer())


def fetch_pictures(call: Call) -> None:
    """Unpack the pictures, unless that was done and the parts are gone."""
    if any(call.packs.glob("part-*.json")) or not (call.data / "splits.json").is_file():
        print(f"{unpack(call.packs, call.data)} files unpacked", flush=True)


def train_base(call: Call) -> str:
    """Begin or continue the base; how that ended. Leaves the averaged weights in the work folder."""
    if call.base_is_finished:
        publish(call)
        return "finished before"
    seconds = min(call.left, call.base_seconds or call.left) - STARTING_SECONDS
    words = ["-m", "stable_sam_cuda.training.sam_lite", "--data", str(call.data), "--out", str(call.base)]
    words += ["--minutes", str(call.base_minutes), "--pause-after", str(max(0.0, seconds / 60)), "--resume"]
    words += ["--validate-minutes", "3", "--checkpoint-minutes", "2", "--tensorboard", "--device", call.device]
    words += call.base_options
    call.base.mkdir(exist_ok=True)
    time_limit = call.left + CLOSING_SECONDS / 2
    ended = run_turns([Turn("base", 0)], 1, time_limit, lambda turn: call.start(words, 2))["base-0"]
    publish(call)
    if ended != "passed" or call.base_is_finished:
        return "finished" if ended == "passed" else ended
    return "paused"


def publish(call: Call) -> None:
    """Base weights and curve as of the last checkpoint, and in $OUT what an unfinished training goes on from."""
    checkpoint_file = call.base / "checkpoint.pt"
    remove_handover(call.out)
    if not checkpoint_file.is_file():  # never begun, or finished on another machine
        return
    checkpoint = torch.load(checkpoint_file, map_location="cpu", weights_only=True)
    write_base(checkpoint, call.work / BASE_FILE, **({"image_size": str(IMAGE_SIZE)} if call.dry else {}))
    draw_base_training(call.base / "log.jsonl", call.base / "curve.png")
    if not call.base_is_finished:
        write_handover(checkpoint, call.out, PART_BYTES)


def turns(rows: str | None) -> list[Turn]:
    """The rows of the study in the order of their value: base and plugins, seed by seed the others."""
    known = list({row.name: row for row in (*FIRST_ROWS, *all_rows())}.values())
    wanted = None if rows is None else rows.split(",")
    if wanted and (unknown := set(wanted) - {row.name for row in known}):
        raise ValueError(f"rows: expected some of {', '.join(row.name for row in known)}, got {sorted(unknown)}")
    chosen = [row for row in known if wanted is None or row.name in wanted]
    return [Turn(row.name, seed, _shared(row, seed)) for seed in (0, 1, 2) for row in chosen if seed in row.seeds]


def _shared(row: Row, seed: int) -> frozenset[str]:
    """Embeddings of the pictures, and of the occlusions that the seed makes of them."""
    if row.options is None:
        return frozenset()
    cache = cache_name(training_options(row, seed))
    return frozenset({cache, f"{cache}, seed {seed}"})


def run_rows(call: Call) -> dict[str, str]:
    """Rows within the time that is left; how each of them ended."""
    threads = max(1, (os.cpu_count() or 1) // call.jobs)

    def start(turn: Turn) -> subprocess.Popen:
        words = ["study/run.py", "--data", str(call.data), "--work", str(call.work / "rows")]
        words += ["--records", str(call.records), "--checkpoint", str(call.work / BASE_FILE)]
        words += ["--rows", turn.row, "--seeds", str(turn.seed), "--device", call.device]
        return call.start(words, threads)

    return run_turns(turns(call.rows), call.jobs, call.left, start)


def write_results(call: Call, record: dict[str, object]) -> None:
    """What $OUT is to hold, but for the parts."""
    files = [path for folder in (call.base, call.records) for path in sorted(folder.rglob("*")) if path.is_file()]
    small = [path for path in files if path.suffix not in (".pt", ".safetensors")]
    plugins = []
    if (call.work / BASE_FILE).is_file():
        save_bytes(call.out / BASE_FILE, (call.work / BASE_FILE).read_bytes())
        rows = call.work / "rows" / base_name(call.work / BASE_FILE)
        plugins = sorted(rows.glob("*/plugin.safetensors"))
    members = [(path.relative_to(call.work).as_posix(), path.read_bytes()) for path in [*small, *plugins, call.log]]
    write_tar(members, call.out / RESULTS)
    save_bytes(call.out / RECORD, json.dumps(record, indent=1).encode())


def run(call: Call) -> dict[str, object]:
    """The whole call; its record."""
    begun = time.monotonic()
    for folder in (call.out, call.work):
        folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, object] = {"device": machine(call.device), "dry_run": call.dry, "torch": torch.__version__}
    record |= {"commit": os.environ.get("STABLE_SAM_COMMIT", "unknown"), "backends": list(backends.available())}
    restore(call)
    call.log.touch()
    fetch_pictures(call)
    record["base"] = train_base(call)
    print(f"base: {record['base']}", flush=True)
    write_results(call, record | {"finished": False})
    if call.base_is_finished:
        record["rows"] = run_rows(call)
    rows = record.get("rows", {})
    record["finished"] = call.base_is_finished and all(outcome == "passed" for outcome in rows.values())
    record["seconds"] = round(time.monotonic() - begun, 1)
    write_results(call, record)
    print(json.dumps(record, indent=1), flush=True)
    return record


def rehearse(call: Call) -> dict[str, object]:
    """Two calls on drawn pictures, the second in another work folder with what the first one left."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_data(folder / "drawn")
        write_untrained(folder / "init.safetensors")
        pack(folder / "drawn", folder / "packs", IMAGE_SIZE, 64 * 2**10)
        # Steps, not minutes, end it: a rehearsal may share a small machine with others.
        tiny = ["--image-size", str(IMAGE_SIZE), "--batch", "2", "--workers", "1", "--steps", "3", "--init"]
        options = {"packs": folder / "packs", "base_options": [*tiny, str(folder / "init.safetensors")], "jobs": 2}
        rows = call.rows or "sam_lite,points"  # all evaluations; a training of one epoch and one seed
        call = replace(call, **options, rows=rows, device="cpu", seconds=3600, dry=True)
        first = replace(call, out=folder / "out", work=folder / "one", base_seconds=0.01)
        record = run(first)
        if record["base"] != "paused":
            raise RuntimeError(f"expected a base that was paused, got {record['base']}\n{first.log.read_text()}")
        return run(replace(call, work=folder / "two", carried=folder / "out"))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, default=Path("packs"), help="folder with the parts that pack.py made")
    parser.add_argument("--work", type=Path, default=ROOT / "study" / "work" / "gpu", help="folder for everything else")
    parser.add_argument("--carried", type=Path, help="what a call on another machine left in $OUT")
    parser.add_argument("--seconds", type=float, default=560, help="for this call")
    parser.add_argument("--base-minutes", type=float, default=10, help="of the base's training, over all calls")
    workers = max(1, (os.cpu_count() or 1) - 2)
    default = f"--image-size 512 --batch 32 --half --workers {workers}"
    parser.add_argument("--base-options", default=default, help=f"of sam_lite's training; default: {default!r}")
    parser.add_argument("--rows", help="names of rows, by commas; default: all")
    parser.add_argument("--jobs", type=int, default=4, help="rows at once")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with drawn pictures")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run rehearses without one", file=sys.stderr)
        return 1
    # As an exception, so that nothing that was started outlives a call that is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = Path(os.environ.get("OUT") or args.work / "out")
    call = Call(
        out, args.work, args.packs, args.seconds, args.base_minutes, shlex.split(args.base_options),
        carried=args.carried, rows=args.rows, jobs=args.jobs,
    )  # fmt: skip
    try:
        turns(args.rows)
        record = rehearse(call) if args.dry_run else run(call)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    outcomes = [str(record["base"]), *record.get("rows", {}).values()]
    return 1 if any(outcome.startswith("failed") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
