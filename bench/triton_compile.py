"""Compiles every Triton kernel for NVIDIA targets without a GPU and records what ptxas and the disassembler say.

    python bench/triton_compile.py [--targets 80 90] [--output bench/results/compile/triton.json]

Each op is called once a variant on tensors without data, with Triton's launch replaced by its ahead-of-time
compiler, so what is compiled is what a launch would compile: same specialisation, same block sizes. Recorded for each
kernel: registers and stack bytes a thread, shared bytes a block, instructions, spilling instructions, those of the
matrix units, and global loads and stores by width in bits.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from stable_sam_cuda import kernels

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BATCH, HEIGHT, WIDTH, MAX_OFFSET = 64, 64, 64, 2.0
VARIANTS = {  # dtype, channels, channels of the amplitude
    "bfloat16": (torch.bfloat16, 256, 0),
    "float16": (torch.float16, 256, 0),
    "float32": (torch.float32, 256, 0),
    "bfloat16, amplitude per pixel": (torch.bfloat16, 256, 1),
    "bfloat16, amplitude per channel": (torch.bfloat16, 256, 256),
    "float32, amplitude per channel": (torch.float32, 256, 256),
    "bfloat16, 100 channels": (torch.bfloat16, 100, 0),
    "float32, 33 channels": (torch.float32, 33, 0),
}
ATTENTION_BATCH = 8
ATTENTION_VARIANTS = {  # dtype, channels, rows of queries: 8 heads of 7, 9 and 20 tokens
    "attention, bfloat16, 56 rows": (torch.bfloat16, 256, 56),
    "attention, float16, 56 rows": (torch.float16, 256, 56),
    "attention, float32, 56 rows": (torch.float32, 256, 56),
    "attention, bfloat16, 72 rows": (torch.bfloat16, 256, 72),
    "attention, float16, 72 rows": (torch.float16, 256, 72),
    "attention, bfloat16, 160 rows": (torch.bfloat16, 256, 160),
    "attention, bfloat16, 512 channels": (torch.bfloat16, 512, 56),
}
HEAD_BATCH = 8
HEAD_VARIANTS = {  # dtype, channels, side of the depthwise kernel
    "offset head, bfloat16": (torch.bfloat16, 256, 5),
    "offset head, float16": (torch.float16, 256, 5),
    "offset head, float32": (torch.float32, 256, 5),
    "offset head, bfloat16, 3 x 3": (torch.bfloat16, 256, 3),
    "offset head, bfloat16, 7 x 7": (torch.bfloat16, 256, 7),
    "offset head, float32, 33 channels": (torch.float32, 33, 5),
}


def disassemble(cubin: bytes) -> dict[str, object]:
    """Resources and memory instructions of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = [
            subprocess.run([DISASSEMBLER, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing[0]))
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", listing[1], re.MULTILINE)

    def widths(operation: str) -> dict[str, int]:
        """Number of instructions by bits moved: LDG.E.128 moves 128, LDG.E.U16 16, LDG.E 32."""
        moved = [re.findall(r"\.[US]?(8|16|64|128)\b", name) for name in instructions if name.startswith(operation)]
        counts = Counter(width[-1] if width else "32" for width in moved)
        return {width: counts[width] for width in sorted(counts, key=int)}

    return {
        "registers": int(used["REG"]),
        "stack_bytes": int(used["STACK"]) + int(used["LOCAL"]),
        "instructions": len(instructions),
        "spills": sum(name.startswith(("LDL", "STL")) for name in instructions),
        "matrix": dict(Counter(name.split(".")[0] for name in instructions if name.startswith(("HGMMA", "HMMA")))),
        "loads": widths("LDG"),
        "stores": widths("STG"),
    }


def compile_launches(capability: int, variant: str) -> list[dict[str, object]]:
    """Call the ops of a variant with launches replaced by compilation for ``sm_<capability>``."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    record = []

    def compile_instead(kernel: JITFunction, *arguments, grid, warmup, **keywords) -> None:
        if variant in ATTENTION_VARIANTS and "attention" not in kernel.__name__ and "merge" not in kernel.__name__:
            return  # the sampler's kernels, which the other variants compile
        keywords["debug"] = False
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*arguments, **keywords)
        options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        facts = {"target": f"sm_{capability}", "kernel": kernel.__name__.strip("_"), "variant": variant}
        facts |= {"programs": grid[0], "warps": options.num_warps}
        facts |= disassemble(compiled.asm["cubin"]) | {"shared_bytes": compiled.metadata.shared}
        if facts not in record:
            record.append(facts)

    real_run, JITFunction.run = JITFunction.run, compile_instead
    try:
        if variant in VARIANTS:
            call_sampler(*VARIANTS[variant])
        elif variant in ATTENTION_VARIANTS:
            call_attention(*ATTENTION_VARIANTS[variant])
        else:
            call_head(*HEAD_VARIANTS[variant])
    finally:
        JITFunction.run = real_run
    return record


def empty_image(batch: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (batch, channels, HEIGHT, WIDTH)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def call_sampler(dtype: torch.dtype, channels: int, amplitude_channels: int) -> None:
    features = empty_image(BATCH, channels, dtype)
    offsets = torch.empty((BATCH, 2, HEIGHT, WIDTH), dtype=dtype, device="meta")
    alpha = torch.empty((BATCH, 2), dtype=dtype, device="meta")
    amplitude = empty_image(BATCH, amplitude_channels, dtype) if amplitude_channels else None
    inputs = (features, offsets, features, alpha, amplitude, MAX_OFFSET)
    kernels.deformable_sample(*inputs)
    kernels.deformable_sample_backward(features, *inputs, 31, True)
    if not amplitude_channels:  # the sum over prompts does not see the amplitude
        inputs = (features, offsets, empty_image(1, channels, dtype), alpha, None, MAX_OFFSET)
        kernels.deformable_sample_backward(features, *inputs, 4, True)


def call_attention(dtype: torch.dtype, channels: int, rows: int) -> None:
    """The gradients that training a plugin asks for, and the positional encoding's."""
    query_rows = torch.empty((ATTENTION_BATCH, rows, channels), dtype=dtype, device="meta")
    features, key_pe = empty_image(ATTENTION_BATCH, channels, dtype), empty_image(1, channels, dtype)
    offsets = torch.empty((ATTENTION_BATCH, 2, HEIGHT, WIDTH), dtype=dtype, device="meta")
    alpha = torch.empty((ATTENTION_BATCH, 2), dtype=dtype, device="meta")
    inputs = (query_rows, features, features, offsets, alpha, key_pe)
    results = kernels.sampled_attention(*inputs, MAX_OFFSET)
    for grad_mask in (0b011111, 0b100000):
        kernels.sampled_attention_backward(query_rows, *inputs, *results, MAX_OFFSET, grad_mask)


def call_head(dtype: torch.dtype, channels: int, kernel_size: int) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    parameters = (empty(channels, 1, kernel_size, kernel_size), *[empty(channels) for _ in range(3)])
    inputs = (empty_image(HEAD_BATCH, channels, dtype), *parameters, empty(2, channels, 1, 1), empty(2), 1e-6)
    kernels.offset_head(*inputs)
    kernels.offset_head_backward(empty(HEAD_BATCH, 2, HEIGHT, WIDTH), *inputs, 0b1111111)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", type=int, default=[80, 86, 89, 90, 100], metavar="CAPABILITY")
    every = [*VARIANTS, *ATTENTION_VARIANTS, *HEAD_VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=every, default=every)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/compile/triton.json")
    options = parser.parse_args()
    record = []
    for capability in options.targets:
        for variant in options.variants:
            record += compile_launches(capability, variant)
            print(f"sm_{capability}, {variant}: done", file=sys.stderr, flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(facts) for facts in record)
    versions = json.dumps({"triton": triton.__version__, "torch": torch.__version__})
    options.output.write_text(f'{{"versions": {versions}, "kernels": [\n{lines}\n]}}\n')
    for facts in record:
        line = "{target} {kernel:22} {variant:34} {registers:4} registers {spills:3} spills, {matrix}, loads {loads}"
        print(line.format(**facts))


if __name__ == "__main__":
    main()
