"""Signals end the program as exceptions, and wait for what must be whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stable_sam_cuda.cli.ending import end_by_exception, signals_deferred

SEGMENT = """
import sys, time
from PIL import Image
from stable_sam_cuda.cli import app, segment as verb
save, opened = Image.Image.save, time.sleep
def slow(self, *arguments, **options):
    save(self, *arguments, **options)
    print("saved", file=sys.stderr, flush=True)
    time.sleep(float(sys.argv[1]))
Image.Image.save = slow
app(sys.argv[2:], prog_name="stable-sam")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_is_an_exception_until_restored(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    restore = end_by_exception()
    try:
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
            time.sleep(1)
    finally:
        restore()
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        end_by_exception()()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_processes_of_torchrun_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    end_by_exception()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    done = []
    restore = end_by_exception()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)), signals_deferred():
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            done.append("whole")
    finally:
        restore()
    assert done == ["whole"]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_segment_ended_in_its_middle_leaves_the_folder_as_it_was(
    number: signal.Signals, code: int, photo: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "deep"
    words = ["segment", str(photo), "--box", "20", "30", "150", "120", "--out", str(out), "--checkpoint"]
    command = [sys.executable, "-c", SEGMENT, "30", *words, str(checkpoint), "--plugin", "none"]
    # A background process of a shell ignores SIGINT, and so would its children.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "saved\n"
    time.sleep(random.random() / 20)
    assert list(out.iterdir())
    process.send_signal(number)
    assert process.wait(30) == code
    assert process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []
