"""Pictures among several processes (``torchrun``): each by exactly one of them, results in the one order."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

from stable_sam_cuda.data.samples import Sample

Result = TypeVar("Result")


@contextmanager
def process_group() -> Iterator[None]:
    """The group that ``torchrun`` describes in the environment; none without it, or where there is one already."""
    wanted = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    if wanted:
        distributed.init_process_group("gloo")
    try:
        yield
    finally:
        if wanted:
            distributed.destroy_process_group()


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def own_share(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Every n-th picture, n being the number of processes. Nothing is padded, so no picture is counted twice."""
    return samples[rank() :: distributed.get_world_size()] if distributed.is_initialized() else samples


def gathered(results: list[list[Result]]) -> list[Result]:
    """All processes' results, given by picture of `own_share`, in the pictures' order; empty but on process 0."""
    shares = [results]
    if distributed.is_initialized():
        shares = [[] for _ in range(distributed.get_world_size())]
        distributed.gather_object(results, shares if rank() == 0 else None)
        if rank() != 0:
            return []
    longest = max(len(share) for share in shares)
    turns = (share[turn] for turn in range(longest) for share in shares if turn < len(share))
    return [result for picture in turns for result in picture]
