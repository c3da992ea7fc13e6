"""Builds, proves and measures the kernels on a bare CUDA machine; bench/on_gpu.sh runs it.

    bench/on_gpu.sh [--second] [--seconds N] [--parts build kernels ...] [--pack] [--dry-run]

The first call takes at most 540 seconds, the second (--second) at most 180; what its time did not allow is listed. It
needs torch 2.11 or later with CUDA, Triton, nvcc, pytest, pytest-benchmark and, for SAM's models, segment_anything; it
reaches for nothing outside the machine. Results go to $OUT, or to bench/results/<gpu>/ without it:
    <date>-<commit>.json   pytest-benchmark's, with how each part ended;  .md   the same to read;  .log   all output
    compiled.00 ...        with --pack: objects and Triton's kernels. The next machine takes them from wheels/
A part that passed for this very commit, here or in bench/results/<gpu>/, is not run again. This project's figures are
compared with the last record of the same GPU: more than 5 % slower is a failure, unless the host decides the time.
--dry-run needs no GPU: it does what a CPU can, on few and small sizes, and says what it left out.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from records import OWN, read, slug, tables
from timing import ROOT, commit

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
STATE = ROOT / "build" / "on_gpu"  # git ignores it; compiled kernels and parts stay there from call to call
BASELINE = "baseline.json"
GRACE_SECONDS = 10  # in which an interrupted pytest writes what it has
LAYERS = [f"bench/test_{name}.py" for name in ("deformable_sample", "deformable_attention", "offset_head")]
MODELS = [f"bench/test_{name}.py" for name in ("decoder", "training_step", "predictor")]
PLANS = ["env", "TRITON_INTERPRET=0", sys.executable, "bench/attention_plans.py"]
NOTHING_SELECTED = 5  # pytest's exit code
PACKED = "compiled."  # objects and Triton's kernels, in $OUT after a call and in wheels/ before one
PACKED_BYTES = 15 << 20  # of a file: some machines give back none above 16 MiB
# Not PyTorch's own.
KERNELS = "regex:^_?(deformable|attention|merge_k|offset_head|forward_k|locations|gather|pixels_k|identity_sum|sum_)"
SECTIONS = [f"--section={name}" for name in ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "LaunchStats")]
OUT_OF_TIME = re.compile("^SKIPPED .*out of time", re.MULTILINE)  # of groups of benchmarks that did not begin
FAILURE = re.compile(
    "^(FAILED|ERROR) |^!.*the device is lost|has failed PercentageRegressionCheck|ERROR SUMMARY: [1-9]"
)


class Part(NamedTuple):
    """Commands that run side by side, within ``seconds``."""

    name: str
    seconds: float
    commands: dict[str, list[str]]
    environment: dict[str, str] = {}  # noqa: RUF012 (nothing writes to it)


def pytest(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *words]


def build(dry: bool) -> Part:
    """For the device's own architecture alone."""
    python = shlex.quote(sys.executable)
    install = f"{python} -m pip install --no-build-isolation --no-deps --no-index -e ."
    # Where pip or its backend is too old: the same libraries, and the folder that an installation would map.
    in_place = f"{python} setup.py build_ext --inplace && ln -sfn ../kernels stable_sam_cuda/kernels"
    architecture = "" if dry else ".".join(map(str, torch.cuda.get_device_capability()))
    environment = {"STABLE_SAM_BUILD": "force", "TORCH_CUDA_ARCH_LIST": architecture}
    return Part("build", 180, {"build": ["bash", "-c", f"{install} || {in_place}"]}, environment)


def first_parts(dry: bool) -> list[Part]:
    """The most valuable first. A file of benchmarks is a part: a kernel that dies takes its process along."""
    marked = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    whole = [path for path in marked if "end_to_end" in path]
    # Triton compiles on the host, so that several processes test sooner than one.
    several = ["-n", str(min(os.cpu_count() or 1, 14))] if find_spec("xdist") and not dry else []
    tests, once = pytest("-m", "gpu", *several), bench(dry, LAYERS, "not compile", "--benchmark-disable")
    return [
        Part("launches", 60, {"pytest": [*once, "--quick", *several]}),
        Part("kernels", 120, {"pytest": [*tests, *(path for path in marked if path not in whole)]}),
        Part("end_to_end", 90, {"pytest": [*tests, *whole]} if whole else {}),
        # Without the cache each tensor is an allocation of its own, and a step outside is seen.
        Part("sanitizer", 75, memory_checks(dry), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        *(timed(dry, file, "bf16 and not warm", 60) for file in LAYERS),
        timed(dry, MODELS[0], "bf16 and not warm", 60),
        timed(dry, MODELS[1], "not fp16 and not warm", 30),
        timed(dry, MODELS[2], "predict", 30),
    ]


def second_parts(dry: bool) -> list[Part]:
    """What the first call left unfinished of the most telling figures, and what it has no time for."""
    ncu = ["ncu", "--clock-control", "none", "--kernel-name", KERNELS, "--launch-count", "60", *SECTIONS]
    ncu += bench(dry, LAYERS, "bf16 and B64- and not warm", "--benchmark-disable")
    rest = "(not bf16 and not warm) or (bf16 and warm and B64-)"
    return [
        *(part for part in first_parts(dry) if "bench" in part.commands),
        # Compiled by many processes, timed by one.
        Part("plans", 60, {f"share {i}": [*PLANS, "--check-only", "--share", f"{i}/8"] for i in range(8)}),
        Part("plan_times", 30, {"plans": PLANS}),
        Part("profile", 40, {"ncu": ncu}),
        *(timed(dry, file, rest, 30, "more_") for file in [*LAYERS, *MODELS[:2]]),
    ]


def timed(dry: bool, file: str, selection: str, seconds: float, prefix: str = "") -> Part:
    name = prefix + Path(file).stem.removeprefix("test_")
    return Part(name, seconds, {"bench": bench(dry, [file], selection, "--benchmark-only")})


def memory_checks(dry: bool) -> dict[str, list[str]]:
    """compute-sanitizer's four tools on some random calls of every kernel, and random calls without it."""
    commands = {}
    for backend in ("cuda", "triton"):
        few = [sys.executable, "bench/fuzz.py", "--backend", backend, "--largest", "9", "--seconds", "35"]
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            check = ["compute-sanitizer", "--error-exitcode", "1", "--tool", tool, *few]
            commands[f"{tool} {backend}"] = check + ["--no-poison"] * (tool == "initcheck")
    many = ["--seed", "1000", *(["--calls", "3", "--largest", "4"] if dry else ["--seconds", "35"])]
    for backend in ("cpu",) if dry else ("cuda", "triton"):
        commands[f"fuzz {backend}"] = [sys.executable, "bench/fuzz.py", "--backend", backend, *many]
    return commands


def bench(dry: bool, files: list[str], selection: str, *options: str) -> list[str]:
    quick = ["--quick", "--device", "cpu", "-k", f"({selection}) and not compile and not backward"]
    return pytest(*files, *options, *(quick if dry else ["--device", "cuda", "-k", selection]))


def why_not(words: list[str], dry: bool) -> str | None:
    """The reason to leave a command out."""
    if dry and words[0] != sys.executable:
        return "needs a CUDA device"
    if not shutil.which(words[0], path=PATH):
        return f"{words[0]} is not installed"
    needs_sam = any("end_to_end" in word or word in MODELS for word in words)
    return "needs segment_anything, which is not installed" if needs_sam and not find_spec("segment_anything") else None


def run_part(part: Part, state: Path, seconds: float, dry: bool, record: dict, log: Path) -> None:
    """Run the part; its outcome and its figures come to ``record``, its output to the end of ``log``."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may have come along in a folder
    environment = os.environ | {"PATH": PATH, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment |= {"TRITON_CACHE_DIR": str(STATE / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(STATE / "inductor")}
    environment |= {"COLUMNS": "300"} | part.environment  # pytest cuts what it says of failures at the terminal's width
    begun, running, commands = time.monotonic(), [], {}
    for name, words in part.commands.items():
        if reason := why_not(words, dry):
            commands[name] = {"status": "left out", "end": reason, "failures": []}
            continue
        figures, output = (state / f"{part.name}-{slug(name)}{suffix}" for suffix in (".json", ".log"))
        figures.unlink(missing_ok=True)
        if "--benchmark-only" in words:
            words = [*words, f"--benchmark-json={figures}", f"--seconds={seconds - GRACE_SECONDS}"]
            words += [f"--deselect={benchmark['fullname']}" for benchmark in record["benchmarks"]]
            if (state / BASELINE).exists():
                words += [f"--benchmark-compare={state / BASELINE}", "--benchmark-compare-fail=median:5%"]
        with output.open("w") as file:
            options = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": file, "start_new_session": True}
            running.append((name, words, figures, output, subprocess.Popen(words, **options)))
    for name, words, figures, output, process in running:
        status, text = outcome(process, begun + seconds), output.read_text(errors="replace")
        status = "out of time" if OUT_OF_TIME.search(text) and status == "passed" else status
        if "--benchmark-only" in words and status == f"failed with exit code {NOTHING_SELECTED}":
            status = "left out"  # all of it was measured before
        failures = [line.strip()[:400] for line in text.splitlines() if FAILURE.search(line)]
        commands[name] = {"status": status, "end": text.strip().rpartition("\n")[2][:200], "failures": failures}
        with log.open("a") as file:
            file.write(f"\n===== {part.name}: {shlex.join(words)}\n{text[-(1 << 20) :]}")
        if figures.exists():
            take_figures(record, json.loads(figures.read_text()))
    statuses = [facts["status"] for facts in commands.values()]
    bad = [status for status in statuses if status not in ("passed", "left out")]
    status = bad[0] if bad else "passed" if "passed" in statuses else "left out"
    record["parts"][part.name] = {"status": status, "seconds": round(time.monotonic() - begun, 1), "commands": commands}


def outcome(process: subprocess.Popen, deadline: float) -> str:
    """How the process ended. At the deadline it is interrupted, and pytest then still writes its figures."""
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.1))
        return "passed" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return "out of time"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its children: it began a session of its own
        process.wait()


def unpack(folder: Path) -> None:
    """What an earlier call compiled on a machine like this, where it came along."""
    if parts := sorted(folder.glob(f"{PACKED}*")):
        whole = b"".join(part.read_bytes() for part in parts)
        subprocess.run(["tar", "xz", "-C", ROOT / "build"], input=whole, check=False)


def pack(folder: Path) -> None:
    """Everything compiled, in files of at most `PACKED_BYTES`."""
    build = ROOT / "build"
    there = [str(path.relative_to(build)) for path in (STATE / "triton", build / "objects") if path.exists()]
    packed = subprocess.run(["tar", "cz", "-C", build, *there], capture_output=True, check=False).stdout
    for number, start in enumerate(range(0, len(packed) if there else 0, PACKED_BYTES)):
        (folder / f"{PACKED}{number:02}").write_bytes(packed[start : start + PACKED_BYTES])


def take_figures(record: dict, new: dict) -> None:
    """Benchmarks of a file of pytest-benchmark's take the place of those of the same name."""
    names = {benchmark["fullname"] for benchmark in new["benchmarks"]}
    kept = [benchmark for benchmark in record["benchmarks"] if benchmark["fullname"] not in names]
    record |= new | {"benchmarks": kept + new["benchmarks"], "parts": record["parts"]}


def take_earlier(record: dict, folders: list[Path], state: Path) -> None:
    """What earlier calls did for this very commit: their figures, and the parts that passed."""
    files = [path for folder in folders for path in sorted(folder.glob(f"*-{record['commit']}.json"))]
    is_built = any(ROOT.glob("stable_sam_cuda/_ops_cuda*.so"))
    for path in files if record["commit"] != "unknown" and not record["commit"].endswith("+") else ():
        earlier = json.loads(path.read_text())
        if earlier["dry_run"] == record["dry_run"]:
            take_figures(record, earlier)
            for name, facts in earlier["parts"].items():
                # What was built lies on that machine alone.
                if facts["status"] == "passed" and (name != "build" or (is_built and path.parent == state)):
                    record["parts"][name] = facts


def write_baseline(results: Path, commit: str, path: Path) -> None:
    """This project's figures in the last record of the same GPU, without those that the host decides."""
    path.unlink(missing_ok=True)
    records = [json.loads(file.read_text()) for file in results.glob("*.json")]
    if before := [one for one in records if one["benchmarks"] and one["commit"].rstrip("+") != commit.rstrip("+")]:
        last = max(before, key=lambda record: record["datetime"])
        facts = [(benchmark, benchmark["extra_info"]) for benchmark in last["benchmarks"]]
        own = [one for one, info in facts if info["contestant"] in OWN and not info.get("host_work")]
        path.write_text(json.dumps(last | {"benchmarks": own}))


def summary(record: dict, path: Path) -> str:
    """How the parts ended, what failed, and all figures, as Markdown."""
    lines = [f"# {record['device']}, commit {record['commit']}", ""]
    lines += ["A rehearsal without a GPU: no figure in it means anything.", ""] * record["dry_run"]
    lines += ["| part | outcome | s | |", "|---|---|---|---|"]
    failed = []
    for name, part in record["parts"].items():
        for command, facts in part["commands"].items() or {"": part | {"end": "", "failures": []}}.items():
            end = facts["end"].replace("|", " ")
            what = f"{name}: {command}" if command else name
            lines.append(f"| {what} | {facts['status']} | {part['seconds']} | {end} |")
            failed += [f"- {name}: {failure}" for failure in facts["failures"]]
    lines += ["", "Failures, and figures that became slower:", "", *failed[:200]] if failed else []
    return "\n".join([*lines, "", *(tables(read(path, path.name)) if record["benchmarks"] else ())]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--second", action="store_true", help="what the first call leaves")
    parser.add_argument("--seconds", type=float, help="for everything together; default: 540, of the second call 180")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="of this call; default: all")
    parser.add_argument("--pack", action="store_true", help="leave what was compiled in $OUT, for the next machine")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    begun, dry = time.monotonic(), options.dry_run
    if not dry and not torch.cuda.is_available():
        print("no CUDA device; --dry-run rehearses without one", file=sys.stderr)
        return 1

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background makes children deaf to it
    device = "no GPU" if dry else torch.cuda.get_device_name()
    results = ROOT / "bench" / "results" / slug(device)
    target = Path(os.environ.get("OUT") or (STATE / "rehearsal" if dry else results)).resolve()
    state = target / "state" if dry else STATE / slug(device)
    for folder in (target, state):
        folder.mkdir(parents=True, exist_ok=True)
    record: dict = {"device": device, "commit": commit(), "dry_run": dry, "parts": {}, "benchmarks": []}
    stem = f"{datetime.date.today().isoformat()}-{record['commit'].rstrip('+')}"
    log = target / f"{stem}.log"
    log.touch()
    unpack(ROOT / "wheels")
    take_earlier(record, [results, target, state], state)
    write_baseline(results, record["commit"], state / BASELINE)
    parts = [build(dry), *(second_parts if options.second else first_parts)(dry)]
    if unknown := {*(options.parts or ())} - {part.name for part in parts}:
        parser.error(f"--parts: expected some of {', '.join(part.name for part in parts)}, got {', '.join(unknown)}")
    deadline = begun + (options.seconds or (3600 if dry else 180 if options.second else 540)) - GRACE_SECONDS
    for part in (part for part in parts if options.parts is None or part.name in options.parts):
        left = deadline - time.monotonic()
        if record["parts"].get(part.name, {}).get("status") == "passed":
            pass
        elif left < GRACE_SECONDS:
            record["parts"][part.name] = {"status": "not begun: out of time", "seconds": 0, "commands": {}}
        else:
            # A rehearsal may share a small machine with others.
            run_part(part, state, min(part.seconds * (5 if dry else 1), left), dry, record, log)
        print(f"{part.name}: {record['parts'][part.name]['status']}", flush=True)
        # After every part, so that a call which is cut short leaves what it has.
        for folder in {target, state}:
            (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        (target / f"{stem}.md").write_text(summary(record, target / f"{stem}.json"))
    if options.pack:
        pack(target)
    print((target / f"{stem}.md").read_text())
    return 0 if all(part["status"] in ("passed", "left out") for part in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
