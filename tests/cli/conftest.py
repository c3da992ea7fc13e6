"""A small model with random weights, a plugin that changes its masks, and a photograph: files as a user has them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import save_plugin
from stable_sam_cuda.sam.lite import new_sam_lite


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    state = {name: tensor.contiguous() for name, tensor in new_sam_lite(image_size=256).state_dict().items()}
    path = tmp_path_factory.mktemp("base") / "sam_lite.safetensors"
    save_file(state, path, {"model": "sam_lite", "variant": "lite0", "image_size": "256"})
    return path


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sampler = DeformableSampler()
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    path = tmp_path_factory.mktemp("plugin") / "plugin.safetensors"
    save_plugin(sampler, path, base_model="sam_lite")
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).resize((200, 150), Image.Resampling.BICUBIC).save(path)
    return path
