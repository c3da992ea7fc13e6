"""The protocol on drawn pictures: prompts, alpha_1 by prompt kind, means, and several processes against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stable_sam_cuda import DeformableSampler, StableSamPredictor, stabilize
from stable_sam_cuda.data.samples import set_of
from stable_sam_cuda.evaluation.protocol import ObjectResult, evaluate, summarize
from stable_sam_cuda.sam.lite import new_sam_lite

KINDS = ["gt_box", "noisy_box", "1_point"]


class Picture:
    """Two discs on noise."""

    def __init__(self, seed: int, set_name: str = "discs") -> None:
        self.name, self.seed = f"{set_name}/{seed}", seed

    @property
    def set_name(self) -> str:
        return set_of(self.name)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        rows, columns = np.mgrid[:60, :80]
        ids = np.zeros((60, 80), np.uint8)
        for object_id, x in ((1, 20), (2, 60)):
            ids[np.hypot(rows - 30, columns - x) < rng.integers(8, 15)] = object_id
        image = rng.integers(0, 100, (60, 80, 3)).astype(np.uint8)
        image[ids > 0] += 150
        return image, ids


@pytest.fixture
def sam():
    torch.manual_seed(0)
    return new_sam_lite("lite0", 64)


@pytest.fixture
def plugin():
    torch.manual_seed(1)
    plugin = DeformableSampler()
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return plugin


def test_results_do_not_depend_on_the_order_of_pictures(sam):
    predictor = StableSamPredictor(sam)
    pictures = [Picture(seed) for seed in range(2)]
    forwards = evaluate(predictor, pictures, KINDS, draws=3)
    backwards = evaluate(predictor, pictures[::-1], KINDS, draws=3)
    assert sorted(forwards, key=str) == sorted(backwards, key=str)
    assert [result.draws for result in forwards[:3]] == [1, 3, 3]


def test_alpha_is_the_mean_of_the_router_over_a_kinds_prompts(sam, plugin):
    stabilize(sam, plugin)
    seen = []
    plugin.router.register_forward_hook(lambda module, inputs, alpha: seen.append(alpha[:, 0].mean().item()))
    results = evaluate(StableSamPredictor(sam), [Picture(0)], KINDS, draws=3)
    assert [result.alpha_1 for result in results] == pytest.approx(seen, rel=1e-6)
    assert len(set(seen)) == len(seen), "the router should tell prompts apart here"
    assert summarize(results)["1_point"]["all"]["alpha_1"] == pytest.approx(np.mean(seen[2::3]), abs=1e-4)


@pytest.mark.parametrize("router_hidden", [None, 0], ids=["plain", "no_router"])
def test_without_a_router_there_is_no_alpha(sam, router_hidden):
    if router_hidden is not None:
        stabilize(sam, DeformableSampler(router_hidden=router_hidden))
    results = evaluate(StableSamPredictor(sam), [Picture(0)], ["gt_box"])
    assert [result.alpha_1 for result in results] == [None, None]
    assert "alpha_1" not in summarize(results)["gt_box"]["all"]


def test_pictures_count_by_the_mean_of_their_objects_and_sets_by_that_of_their_pictures():
    def one(name, index, iou):
        return ObjectResult(set_of(name), name, index, 0.1, "gt_box", 1, iou, iou / 2, 1.0)

    results = [one("a/0", 0, 0.2), one("a/0", 1, 0.4), one("a/1", 0, 0.9), one("b/0", 0, 0.0)]
    figures = summarize(results)["gt_box"]
    assert figures["a"] == {"miou": 60.0, "mbiou": 30.0, "st": 100.0}
    assert figures["sets"]["miou"] == 30.0
    assert figures["all"]["miou"] == 40.0


@pytest.mark.parametrize(
    "kinds, draws, message",
    [
        (["box"], 2, "prompts: expected some of gt_box"),
        ([], 2, "prompts: expected some of gt_box.* got none"),
        (["gt_box", "gt_box"], 2, "prompts: expected each kind once, got gt_box twice"),
        (["gt_box"], 0, "draws: expected at least 1, got 0"),
    ],
    ids=["unknown_kind", "no_kind", "kind_twice", "no_draw"],
)
def test_bad_input_is_named(sam, kinds, draws, message):
    with pytest.raises(ValueError, match=message):
        evaluate(StableSamPredictor(sam), [Picture(0)], kinds, draws=draws)


def test_two_processes_count_each_picture_once_and_agree_with_one(sam, tmp_path):
    from PIL import Image

    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for seed in range(3):  # not a multiple of the processes
        image, ids = Picture(seed).load()
        Image.fromarray(image).save(tmp_path / "data" / "images" / f"{seed}.png")
        Image.fromarray(ids).save(tmp_path / "data" / "masks" / f"{seed}.png")
    state = {name: tensor.contiguous() for name, tensor in sam.state_dict().items()}
    metadata = {"model": "sam_lite", "variant": "lite0", "image_size": "64"}
    save_file(state, tmp_path / "sam.safetensors", metadata)

    verb = [
        "-m",
        "stable_sam_cuda",
        "evaluate",
        "--data",
        "data",
        "--checkpoint",
        "sam.safetensors",
        "--plugin",
        "none",
    ]
    verb += ["--plugin", "none", "--prompts", "gt_box,1_point", "--draws", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outputs = []
    for processes, launcher in ((1, []), (2, ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"])):
        command = [sys.executable, *launcher, *verb, "--out", f"out{processes}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(Path(tmp_path, f"out{processes}", "results.json").read_text())
    alone, together = (json.loads(text) for text in outputs)
    assert len(alone["objects"]) == 3 * 2 * 2
    assert together == alone
