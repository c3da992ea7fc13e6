"""The models of the decoder benchmarks: sam_lite, whose mask decoder is SAM's own, plain and stabilised."""

from copy import deepcopy

import torch
from segment_anything.modeling import Sam

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import load_sam, plugin_of, stabilize, unstabilize
from stable_sam_cuda.sam.lite import IMAGE_SIZE, set_image_size


def models(device: torch.device, image_size: int = IMAGE_SIZE) -> tuple[Sam, Sam]:
    """Plain and stabilised, with a plugin no weight of which is at its initial value; ``image_size`` in pixels."""
    plain = load_sam("sam_lite", device="cpu").requires_grad_(False)
    set_image_size(plain, image_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        stable = stabilize(deepcopy(plain))
        for parameter in plugin_of(stable).parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return plain.to(device), stable.to(device)


def with_both_blocks(stable: Sam) -> Sam:
    """A copy whose plugin, of the same weights, is shared by both two-way blocks."""
    copy = deepcopy(stable)
    plugin = plugin_of(copy)
    shared = DeformableSampler(**plugin.config() | {"blocks": 2})
    shared.load_state_dict(plugin.state_dict())
    return stabilize(unstabilize(copy), shared)
