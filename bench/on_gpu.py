"""Builds, proves and measures the kernels on a bare CUDA machine; bench/on_gpu.sh runs it.

    bench/on_gpu.sh [--seconds 580] [--parts build tests ...] [--dry-run]

Needs torch 2.11 or later with CUDA, Triton, nvcc, pytest, and for the decoder's part segment_anything; reaches for
nothing outside the machine. Parts run most valuable first, each within its own time. Results go to $OUT, or to
bench/results/<gpu>/ without it:
    <date>-<commit>.json   every part's outcome and every figure;  .md   the same to read;  .log   all output
A part recorded as passed for this very commit is not run again. Figures are compared with the last record of the same
GPU in bench/results/<gpu>/: more than 5 % slower is a failure. --dry-run needs no GPU: it does what a CPU can at
tiny sizes and says what it left out.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from regression import BENCHMARKS, last_record, slower
from tables import ceilings, figures_table
from timing import ROOT, commit

PYTHON = sys.executable


@dataclass(frozen=True)
class Command:
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None  # a reason to leave it out


@dataclass(frozen=True)
class Part:
    """Commands that run side by side; the part passes where all do."""

    name: str
    seconds: float
    commands: Callable[["Run"], dict[str, Command]]


@dataclass
class Run:
    dry: bool
    folder: Path  # for what parts hand over
    device: str

    def figures(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def build(run: Run) -> dict[str, Command]:
    if run.dry:
        return {"import": Command([PYTHON, "-c", "import stable_sam_cuda.backends as b; print(b.available())"])}
    major, minor = torch.cuda.get_device_capability()
    install = f"{shlex.quote(PYTHON)} -m pip install --no-build-isolation --no-deps --no-index -e ."
    # Where pip or its backend is too old: the same libraries, and the folder that an installation would map.
    in_place = f"{shlex.quote(PYTHON)} setup.py build_ext --inplace && ln -sfn ../kernels stable_sam_cuda/kernels"
    environment = {"STABLE_SAM_BUILD": "force", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    return {"build": Command(["bash", "-c", f"{install} || ({in_place})"], environment)}


def tests(*files: str) -> Callable[[Run], dict[str, Command]]:
    def commands(run: Run) -> dict[str, Command]:
        paths = [f"tests/cuda/{file}" for file in files]
        words = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", *paths, "-p", "no:cacheprovider"]
        has_workers = subprocess.run([PYTHON, "-c", "import xdist"], capture_output=True).returncode == 0
        # Triton compiles on the host: several processes keep the device from waiting for it.
        return {"pytest": Command([*words, "-n", "8"] if has_workers and not run.dry else words)}

    return commands


def benchmark(name: str, seconds: int) -> Callable[[Run], dict[str, Command]]:
    def commands(run: Run) -> dict[str, Command]:
        words = [PYTHON, f"bench/gpu_{name}.py", "--output", str(run.figures(name))]
        words += ["--device", "cpu", "--tiny", "--seconds", "120"] if run.dry else ["--seconds", str(seconds)]
        return {name: Command(words)}

    return commands


def decoder(run: Run) -> dict[str, Command]:
    """Needs segment_anything, which a bare machine lacks: bench/QUEUE.md tells how to bring it."""
    (name, command), *_ = benchmark("decoder", 50)(run).items()
    found = subprocess.run([PYTHON, "-c", "import segment_anything"], capture_output=True, text=True)
    why_not = None if found.returncode == 0 else f"needs segment_anything: {found.stderr.strip().splitlines()[-1]}"
    return {name: replace(command, why_not=why_not)}


def sanitizer(run: Run) -> dict[str, Command]:
    checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    why_not = "compute-sanitizer is not installed" if checker is None else None
    if run.dry:
        why_not = "needs a CUDA device"
    commands = {}
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        fuzz = [PYTHON, "bench/fuzz.py", "--calls", "25", "--largest", "9", "--seconds", "60"]
        fuzz += ["--no-poison"] if tool == "initcheck" else []
        words = [checker or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *fuzz]
        # Without the cache each tensor is an allocation of its own, and a step outside is seen.
        commands[tool] = Command(words, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, why_not)
    return commands


def fuzz(run: Run) -> dict[str, Command]:
    words = [PYTHON, "bench/fuzz.py", "--seed", "1000"]
    if run.dry:
        few = ["--calls", "3", "--largest", "4", "--seconds", "120"]
        interpreted = {"TRITON_INTERPRET": "1"}
        return {
            "cpu": Command([*words, "--backend", "cpu", *few]),
            "triton": Command([*words, "--backend", "triton", *few], interpreted),
        }
    return {name: Command([*words, "--backend", name, "--seconds", "20"]) for name in ("cuda", "triton")}


def profile(run: Run) -> dict[str, Command]:
    profiler = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    why_not = "needs a CUDA device" if run.dry else ("ncu is not installed" if profiler is None else None)
    options = ["--clock-control", "none", "--profile-from-start", "off"]
    for section in ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "LaunchStats", "WarpStateStats"):
        options += ["--section", section]
    words = [profiler or "ncu", *options, PYTHON, "bench/profile_sampler.py"]
    return {"ncu": Command(words, {}, why_not)}


PARTS = [
    Part("build", 150, build),
    Part("tests", 110, tests("test_on_gpu.py")),
    Part("attention_tests", 110, tests("test_attention_on_gpu.py")),
    Part("attention", 120, benchmark("attention", 80)),
    Part("sampler", 90, benchmark("sampler", 65)),
    Part("decoder", 70, decoder),
    Part("sanitizer", 60, sanitizer),
    Part("fuzz", 45, fuzz),
    Part("profile", 45, profile),
]


def run_part(part: Part, run: Run, seconds: float, log: Path) -> dict[str, object]:
    """The part's record; its output is appended to ``log``."""
    commands = part.commands(run)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may have come along in a folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    begun, deadline = time.monotonic(), time.monotonic() + seconds
    outputs = {name: run.folder / f"{part.name}-{name}.log" for name in commands}
    processes = {}
    for name, command in commands.items():
        if command.why_not is None:
            with outputs[name].open("w") as file:
                processes[name] = subprocess.Popen(
                    command.words,
                    cwd=ROOT,
                    env=environment | command.environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
    outcomes = {}
    for name, command in commands.items():
        if command.why_not is not None:
            outcomes[name] = {"status": "left out", "reason": command.why_not}
            continue
        outcomes[name] = {"status": outcome(processes[name], deadline)}
        text = outputs[name].read_text(errors="replace")
        outcomes[name]["end"] = text.strip().splitlines()[-3:]
        with log.open("a") as file:
            file.write(f"\n===== {part.name}: {shlex.join(command.words)}\n{text}")
    statuses = [outcome["status"] for outcome in outcomes.values()]
    failed = [status for status in statuses if status not in ("passed", "left out")]
    status = failed[0] if failed else ("passed" if "passed" in statuses else "left out")
    return {"status": status, "seconds": round(time.monotonic() - begun, 1), "commands": outcomes}


def outcome(process: subprocess.Popen, deadline: float) -> str:
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with its children: it began a session of its own
        process.wait()
        return "out of time"
    # pytest ends with 5 where it ran no test at all.
    return "passed" if code == 0 else f"failed with exit code {code}"


def passed_before(folders: list[Path], name: str) -> dict[str, dict]:
    """Parts that an earlier run of this commit passed, and its figures."""
    if name == "unknown" or name.endswith("+"):
        return {}
    done: dict[str, dict] = {}
    for folder in folders:
        for path in sorted(folder.glob(f"*-{name}.json")):
            record = json.loads(path.read_text())
            for part, facts in record["parts"].items():
                if facts["status"] == "passed" and part != "build" and not record["dry_run"]:
                    done[part] = facts | {"recorded_in": path.name}
                    if part in BENCHMARKS:
                        done[part]["figures"] = record.get(part)
    return done


def summary(record: dict) -> str:
    lines = [f"# {record['device']}, commit {record['commit']}, {record['date']}", ""]
    if record["dry_run"]:
        lines += ["A rehearsal without a GPU: no figure in it means anything.", ""]
    lines += ["| part | outcome | s | |", "|---|---|---|---|"]
    for name, facts in record["parts"].items():
        for command, details in facts.get("commands", {}).items():
            end = details.get("reason") or " ".join(details.get("end", [])[-1:])
            end = re.sub(r"[|\n]", " ", end)[:160]
            lines.append(f"| {name}: {command} | {details['status']} | {facts['seconds']} | {end} |")
        if "commands" not in facts:
            lines.append(f"| {name} | {facts['status']} | | |")
    if record.get("slower"):
        lines += ["", f"Slower than in {record['compared_with']}:", "", *[f"- {line}" for line in record["slower"]]]
    for name in BENCHMARKS:
        if record.get(name):
            lines += ["", f"## {name}", "", ceilings(record[name]), "", figures_table(record[name]["records"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=580.0, help="for everything together")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run rehearses without one", file=sys.stderr)
        return 1

    device = "no GPU" if options.dry_run else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    results = ROOT / "bench" / "results" / slug
    target = Path(os.environ.get("OUT") or results)
    target.mkdir(parents=True, exist_ok=True)
    record: dict = {"device": device, "commit": commit(), "date": datetime.date.today().isoformat()}
    record |= {"dry_run": options.dry_run, "parts": {}}
    stem = target / f"{record['date']}-{record['commit'].rstrip('+')}"
    log = stem.with_suffix(".log")
    log.write_text("")
    before = passed_before([target, results], record["commit"])
    last = last_record(results, device, record["commit"])

    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.dry_run, Path(folder), device)
        for part in PARTS:
            if options.parts and part.name not in options.parts:
                continue
            left = deadline - time.monotonic()
            if part.name in before:
                record["parts"][part.name] = before[part.name]
                if part.name in BENCHMARKS:
                    record[part.name] = before[part.name].pop("figures")
            elif left < 5:
                record["parts"][part.name] = {"status": "not begun: out of time"}
            else:
                # A rehearsal may share a small machine with others.
                own_time = part.seconds * (4 if options.dry_run else 1)
                record["parts"][part.name] = run_part(part, run, min(own_time, left), log)
            print(f"{part.name}: {record['parts'][part.name]['status']}", flush=True)
            if part.name in BENCHMARKS and run.figures(part.name).exists():
                record[part.name] = json.loads(run.figures(part.name).read_text())
            if last is not None:
                record |= {"compared_with": last.name, "slower": slower(json.loads(last.read_text()), record)}
            # After every part, so that a run cut short leaves what it has.
            stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            stem.with_suffix(".md").write_text(summary(record))
            if part.name == "build" and record["parts"]["build"]["status"] != "passed":
                break
    print(stem.with_suffix(".md").read_text())
    passed = all(facts["status"] in ("passed", "left out") for facts in record["parts"].values())
    return 0 if passed and not record.get("slower") else 1


if __name__ == "__main__":
    sys.exit(main())
