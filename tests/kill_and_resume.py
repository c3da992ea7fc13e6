"""Training that is killed over and over ends with the bits of training that is not.

    python tests/kill_and_resume.py [--kills 20] [--seed 0]

Spawns ``stable-sam train`` on a few drawn pictures and a small model with random weights, kills it with SIGKILL at
random moments, every second time in the middle of writing a checkpoint, resumes it, and compares the final plugin
with that of a run left in peace.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stable_sam_cuda.sam.lite import new_sam_lite

PICTURES = 12
STEPS_A_LIFE = (1, 4)  # at least and at most, from one kill to the next


def write_inputs(folder: Path) -> None:
    """DATA with pictures of bright discs, and the checkpoint of a small model."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :80]
    for part in ("images", "masks"):
        (folder / "data" / part).mkdir(parents=True)
    for stem in range(PICTURES):
        mask = np.hypot(rows - rng.integers(25, 40), columns - rng.integers(25, 55)) < rng.integers(10, 20)
        pixels = rng.integers(0, 100, (64, 80, 3)).astype(np.uint8)
        pixels[mask] = rng.integers(150, 255, 3)
        Image.fromarray(pixels).save(folder / "data" / "images" / f"{stem}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "data" / "masks" / f"{stem}.png")
    torch.manual_seed(0)
    state = {name: tensor.contiguous() for name, tensor in new_sam_lite("lite0", 64).state_dict().items()}
    save_file(state, folder / "sam.safetensors", {"model": "sam_lite", "variant": "lite0", "image_size": "64"})


def start(folder: Path, name: str, epochs: int) -> subprocess.Popen:
    """A process that trains, or continues to train, in the run ``name``."""
    options = {
        "data": folder / "data", "checkpoint": folder / "sam.safetensors", "out": folder / name,
        "cache": folder / "cache", "epochs": epochs, "images": 1, "checkpoint-every": 1, "lr": 0.01,
    }  # fmt: skip
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    command = [sys.executable, "-m", "stable_sam_cuda", "train", *words, "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run's end, which must be a good one."""
    if process.wait() != 0:
        raise RuntimeError(f"the run ended with exit code {process.returncode}")


def logged_steps(out: Path) -> int:
    """How many steps the run's log holds."""
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def partial_files(out: Path) -> list[Path]:
    """What is left of checkpoints that were not finished."""
    return list(out.glob(".checkpoint.pt.*.part"))


def kill_once(process: subprocess.Popen, out: Path, rng: random.Random, mid_save: bool) -> bool:
    """Kill after a few more steps, at once or in a checkpoint's writing; whether half a checkpoint was left."""
    for path in partial_files(out):
        path.unlink()
    target = logged_steps(out) + rng.randint(*STEPS_A_LIFE)
    while logged_steps(out) < target and process.poll() is None:
        time.sleep(0.002)
    if mid_save:
        while not partial_files(out) and process.poll() is None:
            pass
    else:
        time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run ended by itself, with exit code {process.returncode}, before it was killed")
    return bool(partial_files(out))


def compare(folder: Path, kills: int, seed: int = 0) -> tuple[bool, int]:
    """Whether the killed run ends with the same bits, and how many kills left half a checkpoint."""
    rng = random.Random(seed)
    write_inputs(folder)
    epochs = -(-(kills + 1) * STEPS_A_LIFE[1] // PICTURES) + 1
    finish(start(folder, "whole", epochs))
    in_save = 0
    for number in range(kills):
        in_save += kill_once(start(folder, "killed", epochs), folder / "killed", rng, mid_save=number % 2 == 1)
    finish(start(folder, "killed", epochs))
    whole, killed = (load_file(folder / name / "plugin.safetensors") for name in ("whole", "killed"))
    same = whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    logs = [[line.split(', "seconds"')[0] for line in _log(folder / name)] for name in ("whole", "killed")]
    return same and logs[0] == logs[1], in_save


def _log(out: Path) -> list[str]:
    return (out / "log.jsonl").read_text().splitlines()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        same, in_save = compare(Path(folder), args.kills, args.seed)
    print(
        f"killed {args.kills} times, {in_save} of them in mid-save, in {time.monotonic() - started:.0f} s: final "
        f"plugin and log are {'bit for bit those' if same else 'NOT those'} of the run left in peace"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
