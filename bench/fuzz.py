"""Random calls of every operation against the reference in float64, until time or count runs out.

    python bench/fuzz.py --backend cuda|triton|cpu [--seconds 20] [--calls N] [--seed 0] [--largest 20]

Also what the memory checkers run: few calls, small sizes, the reference on the CPU. Every call prints itself before it
starts, so that one which dies can be repeated with its seed.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from attention_cases import (
    ATTENTION_NAMES,
    AttentionCase,
    assert_attention_matches,
    attend_and_differentiate,
    attention_truth,
    make_attention_inputs,
)
from head_cases import HeadCase, assert_head_matches, head_truth, make_head_inputs, run_and_differentiate
from sample_inputs import Case, make_grad_output, make_inputs, output_and_gradients, output_batch, truth
from tolerances import BACKWARD, FORWARD, SUMMED_AFTER_ROUNDING, Tolerance, assert_matches
from torch import Tensor

from stable_sam_cuda.ops import libraries

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if libraries.triton_interprets():
    DTYPES.remove(torch.bfloat16)  # Triton's interpreter cuts off where a device rounds
# Of the tests' tolerances, which are for their own sizes: among thousands of random ones some are harder, and what is
# wrong is wrong by more. The attention in half types: with few pixels and large logits a rounding of u weighs far more.
WIDER, HALF_TYPES = 4.0, 16.0
LAYOUTS = ["channels_last", "channels_last", "contiguous", "strided"]

Check = Callable[[random.Random, int, torch.dtype, int, str, str], None]


def some(generator: random.Random, names: list[str]) -> frozenset[str]:
    """Each of the names in one call of five."""
    return frozenset(name for name in names if generator.random() < 0.2)


def wider(tolerance: Tolerance) -> Tolerance:
    return Tolerance(*[WIDER * limit for limit in tolerance])


def moved(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


def check_sampler(
    generator: random.Random, largest: int, dtype: torch.dtype, seed: int, suffix: str, device: str
) -> None:
    routed, amplitude = generator.random() < 0.7, generator.choice([None, "pixel", "channel"])
    there = ["features", "offsets"] + ["identity", "alpha"] * routed + ["amplitude"] * (amplitude is not None)
    case = Case(
        "fuzz",
        batch=generator.choice([1, 1, 2, 3, 9]),
        channels=generator.choice([1, 2, 3, 7, 8, 12, 16, 31, 32, 64, 72, 256, 264]),
        height=generator.randint(1, largest),
        width=generator.randint(1, largest),
        max_offset=generator.choice([0.0, 0.5, 1.0, 1.5, 2.7, 5.0, 30.0]),
        routed=routed,
        amplitude=amplitude,
        broadcast=some(generator, there),
        layout=generator.choice(LAYOUTS),
    )
    print(repr(case), flush=True)
    inputs, grad_output = make_inputs(case, dtype, seed=seed), make_grad_output(case, dtype, seed=seed + 1)
    expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
    function = getattr(torch.ops.stable_sam_cuda, f"deformable_sample{suffix}")
    output, gradients = output_and_gradients(function, moved(inputs, device), case.max_offset, grad_output.to(device))
    assert_matches("output", output, expected, wider(FORWARD[dtype]))
    for name, gradient in gradients.items():
        summed_later = name not in ("features", "identity") and inputs[name].shape[0] != output_batch(case)
        table = SUMMED_AFTER_ROUNDING if summed_later else BACKWARD
        assert_matches(f"grad_{name}", gradient, expected_gradients[name], wider(table[dtype]))


def check_attention(
    generator: random.Random, largest: int, dtype: torch.dtype, seed: int, suffix: str, device: str
) -> None:
    """With SAM's channels as often as with others: what programs share and how depends on them."""
    case = AttentionCase(
        "fuzz",
        batch=generator.choice([1, 1, 2, 3]),
        rows=generator.choice([1, 5, 8, 16, 17, 56, 64, 72, 130]),
        channels=generator.choice([1, 3, 16, 33, 64, 256, 256, 256]),
        height=generator.randint(2, largest),
        width=generator.randint(2, largest),
        max_offset=generator.choice([0.5, 1.5, 2.7, 5.0]),
        broadcast=some(generator, list(ATTENTION_NAMES[1:])),
        layout=generator.choice(LAYOUTS),
    )
    print(repr(case), flush=True)
    inputs, grad_pooled = make_attention_inputs(case, dtype, seed=seed)
    true_pooled, true_logsumexp, expected = attention_truth(inputs, case.max_offset, grad_pooled)
    function = getattr(torch.ops.stable_sam_cuda, f"sampled_attention{suffix}")
    pooled, logsumexp, gradients = attend_and_differentiate(
        function, moved(inputs, device), case.max_offset, grad_pooled.to(device)
    )
    results = {"pooled": (pooled, true_pooled), "logsumexp": (logsumexp, true_logsumexp)}
    results |= {f"grad_{name}": (gradient, expected[name]) for name, gradient in gradients.items()}
    for name, (actual, true) in results.items():
        assert_attention_matches(name, actual.cpu(), true, dtype, WIDER if dtype == torch.float32 else HALF_TYPES)


def check_offset_head(
    generator: random.Random, largest: int, dtype: torch.dtype, seed: int, suffix: str, device: str
) -> None:
    case = HeadCase(
        "fuzz",
        batch=generator.choice([1, 1, 2, 3]),
        channels=generator.choice([8, 16, 33, 64, 256, 264]),
        height=generator.randint(1, largest),
        width=generator.randint(1, largest),
        kernel_size=generator.choice([1, 3, 5, 5, 5, 7]),
        eps=0.1,  # a variance near 0 is nothing for float32
        layout=generator.choice(LAYOUTS),
    )
    print(repr(case), flush=True)
    inputs, grad_output = make_head_inputs(case, dtype, seed=seed)
    expected, expected_gradients = head_truth(inputs, case.eps, grad_output)
    function = getattr(torch.ops.stable_sam_cuda, f"offset_head{suffix}")
    output, gradients = run_and_differentiate(function, moved(inputs, device), case.eps, grad_output.to(device))
    assert_head_matches("output", output.cpu(), expected, dtype, WIDER)
    for name, gradient in gradients.items():
        assert_head_matches(name, gradient.cpu(), expected_gradients[name], dtype, WIDER)


EVERY = {"sampler": check_sampler, "attention": check_attention, "offset_head": check_offset_head}
CHECKS: dict[str, dict[str, Check]] = {"cuda": {"sampler": check_sampler}, "triton": EVERY, "cpu": EVERY}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=list(CHECKS), default="cuda")
    parser.add_argument("--operation", choices=list(EVERY), help="default: all that the backend has")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--calls", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=20, metavar="SIDE", help="largest height and width")
    parser.add_argument("--no-poison", action="store_true", help="for initcheck: leave fresh tensors uninitialised")
    options = parser.parse_args()
    checks = CHECKS[options.backend]
    names = [options.operation] if options.operation else list(checks)
    suffix = "_triton" if options.backend == "triton" else ""
    device = "cuda" if torch.cuda.is_available() and options.backend != "cpu" else "cpu"
    torch.use_deterministic_algorithms(not options.no_poison)  # fresh tensors hold NaN: what nothing writes shows

    deadline, seed = time.monotonic() + options.seconds, options.seed
    done: Counter[str] = Counter()
    while seed < options.seed + options.calls and time.monotonic() < deadline:
        generator = random.Random(seed)
        name, dtype = generator.choice(names), generator.choice(DTYPES)
        print(f"seed {seed}: {name}, {dtype}, ", end="")
        checks[name](generator, options.largest, dtype, seed, suffix, device)
        done[name] += 1
        seed += 1
    counts = ", ".join(f"{count} of {name}" for name, count in done.items())
    print(f"{options.backend}: {done.total()} random calls match the reference, every gradient included: {counts}")


if __name__ == "__main__":
    main()
