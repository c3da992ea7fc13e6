"""SAM and Stable-SAM on the same picture: what is told of the plugin."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.cli.comparison import compare_models
from stable_sam_cuda.cli.prompts import ObjectPrompt
from stable_sam_cuda.sam import StableSamPredictor, load_sam, plugin_of, save_plugin

BOXES = [(20, 30, 150, 120), (100, 0, 200, 150), (5, 5, 60, 90)]


@pytest.mark.parametrize("blocks", [1, 2], ids=["last-block", "both-blocks"])
@pytest.mark.parametrize("count", [1, 3])
def test_offsets_are_those_of_the_last_block(
    checkpoint: Path, photo: Path, tmp_path: Path, blocks: int, count: int
) -> None:
    torch.manual_seed(0)
    sampler = DeformableSampler(blocks=blocks)
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plugin = tmp_path / "plugin.safetensors"
    save_plugin(sampler, plugin, base_model="sam_lite")
    sam = load_sam("sam_lite", checkpoint=checkpoint)
    prompts = [ObjectPrompt(box=box) for box in BOXES[:count]]
    picture = Image.open(photo).convert("RGB")
    found = compare_models(sam, str(plugin), picture, prompts, backend="auto", multimask=False).offsets

    heard: list[np.ndarray] = []
    hook = plugin_of(sam).offset_network.register_forward_hook(
        lambda _module, _arguments, out: heard.append(out[1].numpy())
    )
    predictor = StableSamPredictor(sam)
    predictor.set_image(np.array(picture))
    predictor.predict_batch([prompt.arguments() for prompt in prompts], False)
    hook.remove()
    assert len(heard) == blocks
    np.testing.assert_array_equal(np.stack(found), heard[-1])
