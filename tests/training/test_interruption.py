"""Ctrl-C and SIGTERM: the step ends, a checkpoint is written, and a resumed run ends with the same bits."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import distributed

from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.progress import NoProgress
from stable_sam_cuda.sam import plugin_of
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.training.interruption import Interrupted, Interruption, Terminated
from stable_sam_cuda.training.run import TrainingRun, train_method
from stable_sam_cuda.training.sam_lite.loop import LiteTrainer
from stable_sam_cuda.training.sam_lite.options import Recipe, Settings

RUN = TrainingRun(images=2, epochs=2, seed=3, checkpoint_every=50)
ENDINGS = {
    signal.SIGINT: (Interrupted, KeyboardInterrupt),
    signal.SIGTERM: (Terminated, SystemExit),
    signal.SIGHUP: (Terminated, SystemExit),
}


def fresh_sam():
    torch.manual_seed(0)
    return new_sam_lite("lite0", 64)


def send(number):
    os.kill(os.getpid(), number)


class Signalling(NoProgress):
    """Progress that sends signals when a step is over."""

    def __init__(self, step, *numbers):
        self.step, self.numbers, self.steps, self.notes = step, numbers, 0, []

    def begin(self, stage, total, completed=0):
        self.training = stage.startswith("training")

    def advance(self, count=1):
        self.steps += self.training
        if self.training and self.steps == self.step:
            for number in self.numbers:
                send(number)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def handlers():
    """Handlers of the tests' own, which must be back afterwards."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ENDINGS}
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in ENDINGS)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_signal_ends_the_step_writes_a_checkpoint_and_leaves(number, handlers, picture_folder, tmp_path):
    samples, progress = find_masked_images(picture_folder), Signalling(3, number)
    options = {"cache": tmp_path / "cache"}
    with pytest.raises(ENDINGS[number][1]) as ended:
        train_method(samples, fresh_sam(), RUN, tmp_path / "run", progress=progress, **options)
    assert type(ended.value) is ENDINGS[number][0]
    assert ended.value.step == 3
    assert number == signal.SIGINT or ended.value.code == 128 + number
    assert progress.notes[-1] == "interrupted: checkpoint at step 3"
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3
    one, other = fresh_sam(), fresh_sam()
    train_method(samples, one, RUN, tmp_path / "run", resume=True, **options)
    train_method(samples, other, RUN, tmp_path / "peace", **options)
    expected = plugin_of(other).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in plugin_of(one).state_dict().items())
    logs = [
        [line.split(', "seconds"')[0] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("run", "peace")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("second", ENDINGS, ids=lambda number: number.name)
def test_a_second_signal_leaves_at_once(second, handlers, picture_folder, tmp_path):
    progress = Signalling(2, signal.SIGINT, second)
    with pytest.raises(ENDINGS[second][1]) as ended:
        train_method(find_masked_images(picture_folder), fresh_sam(), RUN, tmp_path, progress=progress)
    assert not isinstance(ended.value, (Interrupted, Terminated))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_base_models_training_ends_so_too(handlers, picture_folder, tmp_path):
    settings = Settings(picture_folder, tmp_path, Recipe(image_size=64, batch=2, objects=2), minutes=100, steps=9)
    trainer = LiteTrainer(fresh_sam(), find_masked_images(picture_folder), [], settings)
    step = trainer._train_step

    def signalled(*arguments):
        if trainer.step == 2:
            send(signal.SIGINT)
        return step(*arguments)

    trainer._train_step = signalled
    with pytest.raises(Interrupted) as ended:
        trainer.run(lambda record: None)
    assert ended.value.step == torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert (tmp_path / "sam_lite.safetensors").is_file()


def test_an_ignored_signal_stays_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        send(signal.SIGINT)
        assert not interruption.wanted()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_leave_signals_alone(handlers):
    def other():
        with Interruption():
            found.append(signal.getsignal(signal.SIGINT))

    found = []
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


WORKER = """
import sys, time
from pathlib import Path
import torch
from torch import distributed
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.progress import NoProgress
from stable_sam_cuda.training.run import TrainingRun, train_method

rank, out = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
torch.manual_seed(0)
run = TrainingRun(images=2, epochs=100000)


class Telling(NoProgress):
    def note(self, text):
        (out / f"step_{rank}").touch()


train_method(find_masked_images(Path(sys.argv[3])), new_sam_lite("lite0", 64), run, out, progress=Telling())
"""


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_of_two_processes_ends_both(told, picture_folder, tmp_path):
    out = tmp_path / "run"
    commands = [[sys.executable, "-c", WORKER, str(rank), str(out), str(picture_folder)] for rank in range(2)]
    workers = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for command in commands]
    try:
        deadline = time.monotonic() + 200
        while not (out / "step_0").exists():
            assert time.monotonic() < deadline and all(worker.poll() is None for worker in workers)
            time.sleep(0.05)
        workers[told].send_signal(signal.SIGTERM)
        assert [worker.wait(timeout=60) for worker in workers] == [143, 143]
    finally:
        for worker in workers:
            worker.kill()
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] >= 1


def test_a_signal_that_comes_while_processes_meet_is_told_at_the_next_meeting(handlers, monkeypatch):
    meetings = []

    def all_reduce(shared, operation):
        meetings.append(int(shared))
        if len(meetings) == 1:
            send(signal.SIGTERM)  # too late for this meeting

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    with Interruption() as interruption:
        assert [interruption.wanted(), interruption.wanted()] == [False, True]
    assert meetings == [0, signal.SIGTERM]
