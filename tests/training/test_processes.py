"""Two processes are one: gradients, steps and embeddings, with uneven objects and accumulated groups."""

import os
import subprocess
import sys

import pytest
import torch

WORKER = """
import sys, torch
from pathlib import Path
from torch import distributed
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.embeddings import EmbeddingCache
from stable_sam_cuda.training.loop import PluginTrainer
from stable_sam_cuda.training.methods import install_method
from stable_sam_cuda.training.options import TrainingOptions
from stable_sam_cuda.training.run import TrainingRun, train_method
from stable_sam_cuda.training.pictures import CachedPictures

rank, processes, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
if processes > 1:
    store = f"file://{out}.store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
samples = find_masked_images(Path(sys.argv[4]))


def fresh_sam():
    torch.manual_seed(0)
    return new_sam_lite("lite0", 64)


sam = fresh_sam()
cache = EmbeddingCache(out / "cache", sam, samples)
cache.fill()
torch.manual_seed(1)
parameters = install_method(sam, "stable")
found = {"embeddings": cache[list(range(8))]}
# minimum_area leaves two, one or no object of a picture.
for name, options in {"large": {"images": 6}, "accumulated": {"images": 2, "accumulate": 3, "together": 2}}.items():
    options = TrainingOptions(**options, objects=2, minimum_area=0.08)
    trainer = PluginTrainer(sam, parameters, CachedPictures(sam, cache), out, options)
    trainer.optimizer.step = lambda: None
    with trainer.probe:
        record = trainer._train_step(trainer._examples())
    kept = [len(trainer._chosen(trainer.source.example(i).masks, torch.Generator())) for i in trainer._pictures(0)]
    gradients = {key: value.grad.clone() for key, value in parameters.items()}
    found[name] = {"record": record, "gradients": gradients, "objects": kept}
sam = fresh_sam()
parameters = install_method(sam, "stable")
options = TrainingOptions(epochs=2, images=4, checkpoint_every=1)
trainer = PluginTrainer(sam, parameters, CachedPictures(sam, cache), out / "steps", options)
found["steps"] = []
trainer.run(lambda record: found["steps"].append([record["step"], record["loss"], record["iou"]]))
found["trained"] = {name: value.detach() for name, value in parameters.items()}
run = TrainingRun(images=2, occlusions=0, checkpoint_every=2, time_budget=None)
found["run"] = train_method(samples, fresh_sam(), run, out / "run")
torch.save(found, out / f"found_{rank}.pt")
"""


def results(out, data, processes):
    """What each process found."""
    out.mkdir()
    words = [str(processes), str(out), str(data)]
    commands = [[sys.executable, "-c", WORKER, str(rank), *words] for rank in range(processes)]
    workers = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for command in commands]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * processes
    return [torch.load(out / f"found_{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(picture_folder, tmp_path_factory):
    return results(tmp_path_factory.mktemp("processes") / "one", picture_folder, 1)[0]


@pytest.fixture(scope="module")
def both(picture_folder, tmp_path_factory):
    return results(tmp_path_factory.mktemp("processes") / "two", picture_folder, 2)


@pytest.fixture(scope="module")
def one_and_two(alone, both):
    """What a process alone found, and the first of two."""
    return alone, both[0]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["large", "accumulated"])
def test_two_processes_have_the_gradients_of_one(step, one_and_two):
    one, two = (found[step] for found in one_and_two)
    assert len(set(one["objects"])) > 1
    assert sum(one["objects"][::2]) != sum(one["objects"][1::2])  # of the first process and of the second
    assert two["record"] == one["record"]
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one(alone, both):
    first, second = both
    assert first["steps"] == second["steps"]
    assert len(first["steps"]) == 4
    torch.testing.assert_close(torch.tensor(first["steps"]), torch.tensor(alone["steps"]), rtol=1e-4, atol=1e-5)
    for name, value in alone["trained"].items():
        torch.testing.assert_close(first["trained"][name], value, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_two_processes_fill_the_cache_of_one(one_and_two):
    one, two = one_and_two
    assert torch.equal(one["embeddings"], two["embeddings"])


@pytest.mark.slow
def test_a_run_of_two_processes_is_written_once(one_and_two, tmp_path_factory):
    one, two = one_and_two
    assert two["run"].keys() == one["run"].keys()
    assert two["run"]["steps"] == one["run"]["steps"] == 4
    assert two["run"]["final_loss"] == pytest.approx(one["run"]["final_loss"], rel=1e-3)
