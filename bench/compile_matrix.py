"""Compiles every kernel for every GPU architecture without a GPU, and fails where a first launch would.

    python bench/compile_matrix.py                   all of it, in an environment for each torch, about 20 minutes
    python bench/compile_matrix.py --quick           a minute, with the Triton that is installed, without nvcc
    python bench/compile_matrix.py --recompiles      what another number of prompts compiles anew; compiles nothing

Each op is called on tensors without data, with Triton's launch replaced by its compiler, so what is compiled is what a
launch on that device would compile: same specialisation, same block sizes. A line says of each kernel: registers,
spilling instructions, shared memory against what a block may have there. A kernel that does not compile, that Triton
has turned into a trap, or that multiplies fewer than 16 columns (which Triton refuses before 3.8) has failed.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".matrix"
RECORD = ROOT / "bench" / "results" / "compile" / "matrix.json"
TORCHES = {"torch-2.11.0": "torch==2.11.0", "torch-newest": "torch"}
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
COUNTS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 64, 100, 128, 255, 256, 257)  # of prompts


class Call(NamedTuple):
    """One call of an operation, forward and every backward."""

    operation: str
    dtype: str
    channels: int
    map: tuple[int, int]
    prompts: int
    variant: int = 0  # rows of the attention, side of the offset head's kernel, channels of the sampler's amplitude
    shared: bool = False  # one image for all prompts

    def __str__(self) -> str:
        sizes = f"{self.dtype} C={self.channels} {self.map[0]}x{self.map[1]} B={self.prompts}"
        return f"{self.operation} {sizes} {self.variant}{' one image' if self.shared else ''}"


class Kernel(NamedTuple):
    """What became of one kernel; ``error`` where nothing did."""

    name: str
    call: str
    error: str = ""
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    wide_loads: int = 0  # of 16 bytes
    wide_stores: int = 0


DTYPES = ("float32", "float16", "bfloat16")
CHANNELS = (33, 256, 512)
MAPS = ((64, 64), (72, 72), (1, 64), (64, 1), (1, 1))
PROMPTS = (1, 64)
FACTORS: dict[str, tuple[Sequence[Any], ...]] = {
    "attention": (DTYPES, CHANNELS, MAPS, PROMPTS, (8, 56, 72, 160, 512), (False, True)),
    "sampler": (DTYPES, CHANNELS, MAPS, PROMPTS, (0, 1, -1), (False, True)),
    "offset head": (DTYPES, CHANNELS, MAPS, PROMPTS, (1, 3, 5, 7), (False,)),
}
# A call a plan: the commonest of all, and with few channels, which compile fast.
QUICK = [
    Call("attention", "float32", 33, (1, 1), 1, 8),
    Call("attention", "bfloat16", 33, (64, 1), 64, 72, True),
    Call("sampler", "float32", 33, (1, 64), 1, -1),
    Call("sampler", "bfloat16", 256, (64, 64), 64, 0),
    Call("offset head", "bfloat16", 64, (1, 1), 1, 3),
]


# One call a plan of the attention, whatever else meets.
PLANS = [
    Call("attention", dtype, channels, (64, 64), 64, rows)
    for dtype, channels, rows in itertools.product(DTYPES, (256, 512), (56, 160))
]


def pairwise(operation: str) -> Iterator[Call]:
    """Every plan, and calls in which every two values of two factors meet at least once."""
    factors = FACTORS[operation]
    product = [Call(operation, *values) for values in itertools.product(*factors)]

    def pairs(call: Call) -> set[tuple[int, Any, int, Any]]:
        values = call[1:]
        return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}

    missing = set().union(*map(pairs, product))
    for call in PLANS if operation == "attention" else ():
        missing -= pairs(call)
        yield call
    while missing:
        best = max(product, key=lambda call: len(pairs(call) & missing))
        missing -= pairs(best)
        yield best


def call_attention(call: Call) -> None:
    import torch

    from kernels import sampled_attention, sampled_attention_backward

    batch, rows, dtype = call.prompts, call.variant, getattr(torch, call.dtype)
    images = 1 if call.shared else batch
    query_rows = torch.empty((batch, rows, call.channels), dtype=dtype, device="meta")
    features, key_pe = image(images, call), image(1, call)
    offsets = torch.empty((images, 2, *call.map), dtype=dtype, device="meta")
    inputs = (query_rows, features, features, offsets, query_rows.new_empty(batch, 2), key_pe)
    results = sampled_attention(*inputs, 2.0)
    for grad_mask in (0b011111, 0b100000):  # what a plugin's training asks for; the positional encoding alone
        sampled_attention_backward(query_rows, *inputs, *results, 2.0, grad_mask)


def call_sampler(call: Call) -> None:
    import torch

    from kernels import deformable_sample, deformable_sample_backward

    batch, dtype = call.prompts, getattr(torch, call.dtype)
    features = image(1 if call.shared else batch, call)
    offsets, alpha = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((batch, 2, *call.map), (batch, 2)))
    amplitude = image(batch, call, call.channels if call.variant < 0 else 1) if call.variant else None
    for routed in (True, False):
        inputs = (features, offsets, features if routed else None, alpha if routed else None, amplitude, 2.0)
        output = deformable_sample(*inputs)
        deformable_sample_backward(output, *inputs, 31 if routed else 3, True)


def call_head(call: Call) -> None:
    import torch

    from kernels import offset_head, offset_head_backward

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, call.dtype), device="meta")

    channels, side = call.channels, call.variant
    parameters = (empty(channels, 1, side, side), *[empty(channels) for _ in range(3)])
    inputs = (image(call.prompts, call), *parameters, empty(2, channels, 1, 1), empty(2), 1e-6)
    output = offset_head(*inputs)
    offset_head_backward(output, *inputs, 0b1111111)


def image(batch: int, call: Call, channels: int | None = None):
    """Without data, channels-last."""
    import torch

    shape = (batch, channels or call.channels, *call.map)
    dtype = getattr(torch, call.dtype)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


CALLS: dict[str, Callable[[Call], None]] = {
    "attention": call_attention,
    "sampler": call_sampler,
    "offset head": call_head,
}


class Launches:
    """In place of `JITFunction.run`: launches are bound to their specialisation and handed to ``take``, not made."""

    def __init__(self, capability: int, take: Callable[..., None]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        self.target = GPUTarget("cuda", capability, 32)
        self.backend, self.take = make_backend(self.target), take
        self.capability = capability

    def of(self, call: Call) -> None:
        """Take the launches of one call, with the block sizes of this architecture's device."""
        from triton.runtime.jit import JITFunction

        from kernels.launch import Device, assuming

        real, JITFunction.run = JITFunction.run, lambda kernel, *a, grid, warmup, **k: self._bind(kernel, a, k, call)
        try:
            with assuming(Device(*DEVICES[self.capability], self.capability)):
                CALLS[call.operation](call)
        finally:
            JITFunction.run = real

    def _bind(self, kernel, arguments: tuple, keywords: dict, call: Call) -> None:
        from triton.runtime.jit import create_function_from_signature

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


def compile_calls(capability: int, calls: Sequence[Call], match: str, take: Callable[[Kernel], None]) -> None:
    """Every kernel of the calls whose name and call ``match``, each specialisation once."""
    import triton
    from triton.compiler import ASTSource

    done: set[str] = set()

    def compile_once(kernel, call: Call, key: str, source: tuple) -> None:
        name = kernel.__name__.strip("_")
        if f"{name} {key}" in done or not re.search(match, f"{name}, {call}"):
            return
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
        used = disassemble(compiled.asm["cubin"])
        narrow = f"a product of {min(columns)} columns" if columns and min(columns) < FEWEST_COLUMNS else ""
        trap = "" if used["loads"] else "compiled to a trap: it loads nothing"
        take(
            Kernel(
                name,
                str(call),
                narrow or trap,
                used["registers"],
                used["spills"],
                compiled.metadata.shared,
                used["wide_loads"],
                used["wide_stores"],
            )
        )

    launches = Launches(capability, compile_once)
    for call in calls:
        launches.of(call)


def disassemble(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and instructions: global loads, those and stores of 16 bytes, spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def count(pattern: str) -> int:
        return len(re.findall(pattern, listing))

    return {
        "registers": int(re.search(r"\bREG:(\d+)", listing)[1]),
        "loads": count(r"\bLDG\b"),
        "wide_loads": count(r"\bLDG\.E[.\w]*\.128\b"),
        "wide_stores": count(r"\bSTG\.E[.\w]*\.128\b"),
        "spills": count(r"\b(?:LDL|STL)\b"),
    }


def work(capability: int, quick: bool, match: str, output: Path | None) -> list[Kernel]:
    """Compile for one architecture with the Triton of this interpreter; a line a kernel, and JSON where asked for."""
    import torch
    import triton

    where = f"torch {torch.__version__.split('+')[0]}, Triton {triton.__version__}, sm_{capability}"
    kernels: list[Kernel] = []

    def take(kernel: Kernel) -> None:
        kernels.append(kernel)
        print(f"{where}: {line(kernel, DEVICES[capability][1])}", flush=True)

    calls = QUICK if quick else [call for operation in FACTORS for call in pairwise(operation)]
    compile_calls(capability, calls, match, take)
    if output is not None:
        facts = {"torch": torch.__version__, "triton": triton.__version__, "architecture": f"sm_{capability}"}
        output.write_text(json.dumps(facts | {"kernels": [kernel._asdict() for kernel in kernels]}))
    return kernels


def line(kernel: Kernel, limit: int) -> str:
    if kernel.error:
        return f"{kernel.name}, {kernel.call}: FAILED, {kernel.error}"
    over = " OVER THE LIMIT" if kernel.shared_bytes > limit else ""
    used = f"{kernel.registers} registers, {kernel.spills} spills, {kernel.shared_bytes} of {limit} shared bytes{over}"
    return f"{kernel.name}, {kernel.call}: {used}"


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
    parser.add_argument("--match", default="", metavar="REGEX", help="with --quick or --only: kernels by name and call")
    parser.add_argument("--recompiles", action="store_true", help="JSON: what another number of prompts compiles anew")
    parser.add_argument("--output", type=Path, help="JSON of --only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    options = parser.parse_args()
    if options.recompiles:
        print(json.dumps(compare_counts()))
        return 0
    if options.only or options.quick:
        found = []
        for capability in [options.only] if options.only else (80, 90):
            made = work(capability, options.quick, options.match, options.output)
            found += [(f"sm_{capability}", kernel) for kernel in made]
    else:
        found = run_all(options.jobs)
    failed = sum(bool(kernel.error) for _, kernel in found)
    over = sum(kernel.shared_bytes > DEVICES[int(name[3:])][1] for name, kernel in found)
    spilling = sum(kernel.spills > 0 for _, kernel in found)
    made = f"{len(found) - failed} compiled, {failed} failed"
    print(f"compile matrix: {made}, {over} over the limit, {spilling} with spills")
    return 1 if failed or over else 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.append(str(ROOT))  # behind PYTHONPATH
    sys.exit(main())
