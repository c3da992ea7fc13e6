"""Compiles every kernel for every GPU architecture without a GPU, and fails where a first launch would.

    python bench/compile_matrix.py                   all of it, in an environment for each torch, half an hour
    python bench/compile_matrix.py --quick           a minute, with the Triton that is installed, without nvcc
    python bench/compile_matrix.py --recompiles      what another number of prompts compiles anew; compiles nothing

Each op is called on tensors without data, with Triton's launch replaced by its compiler, so what is compiled is what a
launch on that device would compile: same specialisation, same block sizes. A line says of each kernel: registers and
spilled bytes of a thread, shared memory of a block against what it may have there. A kernel fails if it does not
compile, if Triton has turned it into a trap, if it multiplies fewer than 16 columns, which Triton refuses before 3.8,
if it takes the instructions of Hopper's warp groups, with which its results were wrong, or if it needs more tensor
memory than there is.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"
sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind PYTHONPATH

import torch
import triton
from matrix_calls import CALLS, DTYPES, FACTORS, PLANS, QUICK, Call, pairwise
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels.attention import plan as attention_plan
from kernels.launch import Device, NoPlanFitsError, assuming

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".matrix"
RECORD = ROOT / "bench" / "results" / "compile" / "matrix.json"
TORCHES = {"torch-2.11.0": "torch==2.11.0", "torch-newest": "torch"}
# Every torch compiles the plans that each architecture takes, and the smallest maps. The rest, plans to fall back to
# and every pair of values, is compiled once for each architecture, by the torch that has it here.
ALL_PAIRS = {"torch-2.11.0": (80, 90, 100), "torch-newest": (86, 89, 120)}
# Multiprocessors, shared bytes a block may have: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
DEVICES = {
    80: (108, 166_912),
    86: (82, 101_376),
    89: (128, 101_376),
    90: (132, 232_448),
    100: (148, 232_448),
    120: (170, 101_376),
}
FEWEST_COLUMNS = 16  # of the left factor of a product, for Triton before 3.8
TENSOR_COLUMNS = 512  # of a multiprocessor of sm_100
COUNTS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 64, 100, 128, 255, 256, 257)  # of prompts


class Kernel(NamedTuple):
    """What became of one kernel; ``error`` where nothing did."""

    name: str
    call: str
    error: str = ""
    registers: int = 0
    spilled_bytes: int = 0  # of a thread
    shared_bytes: int = 0
    wide_loads: int = 0  # of 16 bytes
    wide_stores: int = 0


class Launches:
    """In place of `JITFunction.run`: launches are bound to their specialisation and handed to ``take``, not made."""

    def __init__(self, capability: int, take: Callable[..., None]) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.backend, self.take = make_backend(self.target), take
        self.capability = capability

    def of(self, call: Call, *, every_plan: bool = False) -> None:
        """Take the launches of one call, with the block sizes of this architecture's device.

        ``every_plan``: also with those that are left where the device refuses the better ones.
        """
        device = Device(*DEVICES[self.capability], self.capability)
        limits = smaller_limits(call, device) if every_plan else []
        real, JITFunction.run = JITFunction.run, lambda kernel, *a, grid, warmup, **k: self._bind(kernel, a, k, call)
        try:
            with assuming(device):
                CALLS[call.operation](call)
            for limit in limits:
                # Less than the forward needs fits the backward's plans, or the other way round.
                with assuming(device._replace(shared_bytes=limit)), contextlib.suppress(NoPlanFitsError):
                    CALLS[call.operation](call)
        finally:
            JITFunction.run = real

    def _bind(self, kernel, arguments: tuple, keywords: dict, call: Call) -> None:
        keywords |= {"debug": False}
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = bind(*arguments, **keywords)
        options, signature, constants, attributes = kernel._pack_args(
            self.backend, keywords, bound, specialization, options
        )
        self.take(kernel, call, f"{specialization} {options}", (signature, constants, attributes, options))


def recompiles(call: Call, capability: int = 90) -> dict[str, int]:
    """Kernel -> how often it is compiled for 1 to 257 prompts beyond what one of these numbers alone asks for."""
    keys: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))

    def take(kernel, call: Call, key: str, source: tuple) -> None:
        keys[kernel.__name__.strip("_")][call.prompts].add(key)

    launches = Launches(capability, take)
    for count in COUNTS:
        launches.of(call._replace(prompts=count))
    return {
        name: len(set().union(*of_counts.values())) - max(map(len, of_counts.values()))
        for name, of_counts in keys.items()
    }


def compare_counts() -> dict[str, dict[str, int]]:
    """`recompiles` of every operation and dtype at SAM's sizes, each prompt on an image of its own or all on one."""
    factors = itertools.product(("attention", "sampler", "offset head"), DTYPES, (False, True))
    calls = (
        Call(operation, dtype, 256, (64, 64), 1, {"attention": 56, "sampler": 0, "offset head": 5}[operation], shared)
        for operation, dtype, shared in factors
    )
    return {str(call): recompiles(call) for call in calls}


def smaller_limits(call: Call, device: Device) -> list[int]:
    """Shared memory of which each plan of the attention is the best that fits."""
    ladders = (attention_plan.forward_plans, attention_plan.tiles_plans, attention_plan.rows_plans)
    sizes = (getattr(torch, call.dtype), call.channels, call.variant, device)
    needed = {plan.shared_bytes for ladder in ladders for plan in ladder(*sizes)}
    return sorted((bytes_ for bytes_ in needed if bytes_ < device.shared_bytes), reverse=True)


def compile_calls(
    capability: int, calls: Sequence[Call], match: str, all_plans: bool, take: Callable[[Kernel], None]
) -> None:
    """Every kernel of the calls whose name and call ``match``, each specialisation once."""
    done: set[str] = set()

    def compile_once(kernel, call: Call, key: str, source: tuple) -> None:
        name = kernel.__name__.strip("_")
        if f"{name} {key}" in done or not re.search(match, f"{name}, {call}"):
            return
        is_own = "attention" in name or name == "merge_kernel"
        if call.operation == "attention" and call.channels >= 256 and call not in PLANS and not is_own:
            return  # a kernel of the sampler, which calls of few channels have among theirs
        done.add(f"{name} {key}")
        signature, constants, attributes, options = source
        try:
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, attributes), target=launches.target, options=options.__dict__
            )
        except Exception as error:  # a compiler fails in many ways, and each is a finding
            take(Kernel(name, str(call), f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"))
            return
        columns = [int(k) for k in re.findall(r"tt\.dot .* : tensor<\d+x(\d+)x", compiled.asm["ttir"])]
        registers, spilled = resources(compiled.asm["cubin"])
        accesses = Counter(re.findall(r"\b(?:ld|st)\.global\b(?:\.v4\.b32|\.v2\.b64)?", compiled.asm["ptx"]))
        loads = sum(count for access, count in accesses.items() if access.startswith("ld"))
        narrow = f"a product of {min(columns)} columns" if columns and min(columns) < FEWEST_COLUMNS else ""
        groups = "takes warp-group instructions" if "wgmma.mma_async" in compiled.asm["ptx"] else ""
        trap = "" if loads else "compiled to a trap: it loads nothing"
        tensor_columns = getattr(compiled.metadata, "tmem_size", None) or 0
        full = f"{tensor_columns} columns of tensor memory" if tensor_columns > TENSOR_COLUMNS else ""
        take(
            Kernel(
                name,
                str(call),
                narrow or trap or groups or full,
                registers,
                spilled,
                compiled.metadata.shared,
                loads - accesses["ld.global"],
                accesses.total() - loads - accesses["st.global"],
            )
        )

    launches = Launches(capability, compile_once)
    for call in calls:
        launches.of(call, every_plan=all_plans and call in PLANS)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack, on which nothing but spilled registers lies."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    return registers, stack


def work(capability: int, calls: Sequence[Call], match: str, all_plans: bool, output: Path | None) -> list[Kernel]:
    """Compile for one architecture with the Triton of this interpreter; a line a kernel, and JSON where asked for."""
    where = f"torch {torch.__version__.split('+')[0]}, Triton {triton.__version__}, sm_{capability}"
    kernels: list[Kernel] = []

    def take(kernel: Kernel) -> None:
        kernels.append(kernel)
        print(f"{where}: {line(kernel, DEVICES[capability][1])}", flush=True)

    compile_calls(capability, calls, match, all_plans, take)
    if output is not None:
        facts = {"torch": torch.__version__, "triton": triton.__version__, "architecture": f"sm_{capability}"}
        output.write_text(json.dumps(facts | {"kernels": [kernel._asdict() for kernel in kernels]}))
    return kernels


def line(kernel: Kernel, limit: int) -> str:
    if kernel.error:
        return f"{kernel.name}, {kernel.call}: FAILED, {kernel.error}"
    over = " OVER THE LIMIT" if kernel.shared_bytes > limit else ""
    of_thread = f"{kernel.registers} registers, {kernel.spilled_bytes} bytes spilled"
    return f"{kernel.name}, {kernel.call}: {of_thread}, {kernel.shared_bytes} of {limit} shared{over}"


def environment(name: str) -> Path:
    """The Python of an environment with this torch and its own Triton, made where it is not there."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not (ENVIRONMENTS / name / ".installed").exists():
        print(f"installing {TORCHES[name]} into {python.parents[1].relative_to(ROOT)} (several GB, once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", python.parents[1]], check=True)
        # setuptools: Triton before 3.7 needs it, and torch asks for it on new versions of Python alone.
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCHES[name], "setuptools", "numpy"], check=True)
        (ENVIRONMENTS / name / ".installed").touch()
    return python


def compile_cuda(folder: Path) -> list[tuple[str, Kernel]]:
    """The CUDA C++ sources, by nvcc, for the same architectures."""
    from cuda_compile import MOST_DYNAMIC_SHARED_BYTES, compile_sources

    kernels = []
    for made in compile_sources([f"sm_{capability}" for capability in DEVICES], folder):
        shared = made.shared_bytes + MOST_DYNAMIC_SHARED_BYTES
        error = "" if made.error is None else made.error
        kernel = Kernel(made.kernel or "-", made.source, error, made.registers, made.spill_bytes, shared)
        kernels.append((made.architecture, kernel))
        print(f"nvcc, {made.architecture}: {line(kernel, DEVICES[int(made.architecture[3:])][1])}", flush=True)
    return kernels


def run_all(jobs: int) -> list[tuple[str, Kernel]]:
    """Architecture and kernel, by every torch and by nvcc; the record is written."""
    pythons = {name: environment(name) for name in TORCHES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def worker(job: tuple[str, int]) -> dict[str, Any]:
            environment_name, capability = job
            output = folder / f"{environment_name}-{capability}.json"
            command = [pythons[environment_name], __file__, "--only", str(capability), "--output", output]
            command += [] if capability in ALL_PAIRS[environment_name] else ["--plans"]
            variables = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / environment_name)}
            subprocess.run(command, env=variables, check=False)
            return json.loads(output.read_text())

        with ThreadPoolExecutor(jobs) as pool:
            records = list(pool.map(worker, itertools.product(TORCHES, DEVICES)))
        found = [(f["architecture"], Kernel(**kernel)) for f in records for kernel in f["kernels"]]
        found += compile_cuda(folder)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record) for record in records)
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a call a plan, for sm_80 and sm_90, by this Triton")
    parser.add_argument("--only", type=int, choices=DEVICES, help="one architecture, by this Triton, without nvcc")
    parser.add_argument(
        "--plans", action="store_true", help="with --only: the plans it takes, and what --quick compiles"
    )
    parser.add_argument("--match", default="", metavar="REGEX", help="with --quick or --only: kernels by name and call")
    parser.add_argument("--recompiles", action="store_true", help="JSON: what another number of prompts compiles anew")
    parser.add_argument("--output", type=Path, help="JSON of --only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    options = parser.parse_args()
    if options.recompiles:
        print(json.dumps(compare_counts()))
        return 0
    if options.only or options.quick:
        calls = QUICK if options.quick or options.plans else []
        calls = [*calls, *(PLANS if options.plans else [])] or [call for name in FACTORS for call in pairwise(name)]
        found = []
        for capability in [options.only] if options.only else (80, 90):
            made = work(capability, calls, options.match, not options.plans, options.output)
            found += [(f"sm_{capability}", kernel) for kernel in made]
    else:
        found = run_all(options.jobs)
    failed = sum(bool(kernel.error) for _, kernel in found)
    over = sum(kernel.shared_bytes > DEVICES[int(name[3:])][1] for name, kernel in found)
    spilling = sum(kernel.spilled_bytes > 0 for _, kernel in found)
    made = f"{len(found) - failed} compiled, {failed} failed"
    print(f"compile matrix: {made}, {over} over the limit, {spilling} with spills")
    return 1 if failed or over or not found else 0


if __name__ == "__main__":
    sys.exit(main())
