"""Seeds differ wherever their parts do, in the bits that PyTorch's generator looks at."""

import itertools

import torch

from stable_sam_cuda.data.rts import ROBUST, draw_kind
from stable_sam_cuda.data.seeds import seed_of


def test_every_part_changes_what_a_generator_draws() -> None:
    parts = itertools.product(range(3), ("ecssd/0001", "ecssd/0002"), range(5), ("gt_box", "noisy_box"))
    draws = [torch.rand(2, generator=torch.Generator().manual_seed(seed_of(*each))) for each in parts]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws) == 60


def test_the_same_parts_give_the_same_seed_everywhere() -> None:
    assert seed_of(0, "ecssd/0001", 3) == 6179346801628794899


def test_first_draws_of_neighbouring_seeds_follow_the_mix() -> None:
    kinds = [draw_kind(ROBUST, torch.Generator().manual_seed(seed_of(0, step))) for step in range(600)]
    names, frequencies = ROBUST.kinds()
    for name, frequency in zip(names, frequencies, strict=True):
        assert abs(kinds.count(name) / 600 - frequency / sum(frequencies)) < 0.06, name
