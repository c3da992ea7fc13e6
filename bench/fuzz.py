"""Random calls of deformable_sample against the reference in float64, until time or count runs out.

    python bench/fuzz.py --backend cuda|triton|cpu [--seconds 20] [--calls N] [--seed 0] [--largest 20]

Also what the memory checkers run: few calls, small sizes, the reference on the CPU. Every call prints itself before it
starts, so that one which dies can be repeated with its seed.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from sample_inputs import NAMES, Case, make_grad_output, make_inputs, output_and_gradients, output_batch, truth
from tolerances import BACKWARD, FORWARD, SUMMED_AFTER_ROUNDING, assert_matches

from stable_sam_cuda.ops import triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if triton.interprets():
    DTYPES.remove(torch.bfloat16)  # Triton's interpreter cuts off where a device rounds


def draw_case(generator: random.Random, largest: int) -> Case:
    routed, amplitude = generator.random() < 0.7, generator.choice([None, "pixel", "channel"])
    there = ["features", "offsets"] + ["identity", "alpha"] * routed + ["amplitude"] * (amplitude is not None)
    return Case(
        "fuzz",
        batch=generator.choice([1, 1, 2, 3, 9]),
        channels=generator.choice([1, 2, 3, 7, 8, 12, 16, 31, 32, 64, 72, 256, 264]),
        height=generator.randint(1, largest),
        width=generator.randint(1, largest),
        max_offset=generator.choice([0.0, 0.5, 1.0, 1.5, 2.7, 5.0, 30.0]),
        routed=routed,
        amplitude=amplitude,
        broadcast=frozenset(name for name in there if generator.random() < 0.2),
        layout=generator.choice(["channels_last", "channels_last", "contiguous", "strided"]),
    )


def check(case: Case, dtype: torch.dtype, seed: int, operation: str, device: str) -> None:
    inputs, grad_output = make_inputs(case, dtype, seed=seed), make_grad_output(case, dtype, seed=seed + 1)
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in inputs.items()}
    function = getattr(torch.ops.stable_sam_cuda, operation)
    output, gradients = output_and_gradients(function, moved, case.max_offset, grad_output.to(device))
    assert_matches("output", output, expected, FORWARD[dtype])
    for name, gradient in gradients.items():
        summed_later = name not in ("features", "identity") and inputs[name].shape[0] != output_batch(case)
        table = SUMMED_AFTER_ROUNDING if summed_later else BACKWARD
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], table[dtype])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["cuda", "triton", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--calls", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=20, metavar="SIDE", help="largest height and width")
    parser.add_argument("--no-poison", action="store_true", help="for initcheck: leave fresh tensors uninitialised")
    options = parser.parse_args()
    operation = "deformable_sample" + "_triton" * (options.backend == "triton")
    device = "cuda" if torch.cuda.is_available() and options.backend != "cpu" else "cpu"
    torch.use_deterministic_algorithms(not options.no_poison)  # fresh tensors hold NaN: what nothing writes shows

    deadline, seed = time.monotonic() + options.seconds, options.seed
    while seed < options.seed + options.calls and time.monotonic() < deadline:
        generator = random.Random(seed)
        case, dtype = draw_case(generator, options.largest), generator.choice(DTYPES)
        print(f"seed {seed}: {dtype}, {case!r}", flush=True)
        check(case, dtype, seed, operation, device)
        seed += 1
    print(f"{options.backend}: {seed - options.seed} random calls match {', '.join(NAMES)} of the reference")


if __name__ == "__main__":
    main()
