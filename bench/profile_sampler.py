"""One forward and one backward of deformable_sample, for a profiler that starts when told to.

    ncu --clock-control none --profile-from-start off --section SpeedOfLight --section Occupancy \\
        python bench/profile_sampler.py [--backend cuda] [--batch 64] [--dtype bfloat16]
"""

import argparse

import torch
from gpu_sampler import MAX_OFFSET, Size, make_inputs
from sampler_providers import own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["cuda", "triton"], default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options = parser.parse_args()
    device = torch.device("cuda")
    inputs, grad_output = make_inputs(Size(getattr(torch, options.dtype), options.batch), device)
    sampler = own(device)[options.backend]
    for profiled in (False, True):  # the first time warms up, and compiles where it has to
        if profiled:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        output = sampler(*inputs, MAX_OFFSET)
        torch.autograd.grad(output, inputs, grad_output)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
