"""One cache of embeddings for several processes, and for processes that are killed.

    python tests/shared_cache.py [--tries 20] [--kills 20] [--pictures 40]

Processes are forked that begin together to fill one new cache, two and four of them, each with an encoder and pictures
of its own; each must end well, and every embedding must be the encoder's. Then one process after the other fills
a cache until it is killed with SIGKILL at a random moment; the next one must find nothing that is wrong.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.embeddings import EmbeddingCache
from stable_sam_cuda.sam.lite import new_sam_lite

FORK = multiprocessing.get_context("fork")


def write_pictures(folder: Path, count: int) -> None:
    """DATA with noisy pictures, each with one square object."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 255
    for stem in range(count):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / "images" / f"{stem:03}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{stem:03}.png")


def new_cache(folder: Path) -> EmbeddingCache:
    """The cache in ``folder``, of an encoder that is always the same."""
    torch.manual_seed(0)
    return EmbeddingCache(folder / "cache", new_sam_lite("lite0", 64), find_masked_images(folder / "data"))


def _fill(folder: Path, start: float) -> None:
    torch.set_num_threads(1)
    while time.time() < start:
        time.sleep(0.001)
    new_cache(folder).fill()
    # No thread pool of torch's or of the parent's is waited for.
    os._exit(0)


def spawn(folder: Path, start: float = 0.0) -> multiprocessing.Process:
    """A process that fills the cache."""
    process = FORK.Process(target=_fill, args=(folder, start))
    process.start()
    return process


def truth(folder: Path) -> torch.Tensor:
    """What the embeddings must be, from a cache that one process made in peace."""
    alone = folder / "alone"
    alone.mkdir()
    (alone / "data").symlink_to(folder / "data")
    process = spawn(alone)
    process.join()
    cache = new_cache(alone)
    return cache[list(range(len(cache.samples)))]


def is_right(folder: Path, expected: torch.Tensor) -> bool:
    """Whether all embeddings are there, whole and the encoder's; nothing may have to be computed for that."""
    cache = new_cache(folder)
    stored = [torch.from_numpy(cache._read(picture)).float() for picture in cache._pictures]
    return bool(cache.done.all()) and torch.allclose(torch.stack(stored), expected, atol=1e-3, rtol=1e-3)


def race(folder: Path, processes: int, tries: int, pictures: int) -> int:
    """How many of the tries ended well, in which so many processes began together."""
    torch.set_num_threads(1)
    write_pictures(folder / "data", pictures)
    expected, right = truth(folder), 0
    for _ in range(tries):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        start = time.time() + 0.3
        started = [spawn(folder, start) for _ in range(processes)]
        for process in started:
            process.join()
        ended = [process.exitcode for process in started]
        right += ended == [0] * processes and is_right(folder, expected)
    return right


def kill(folder: Path, kills: int, pictures: int, seed: int = 0) -> int:
    """After how many of the kills, at random moments of the filling, the next process filled the cache well."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    write_pictures(folder / "data", pictures)
    began = time.time()
    expected, right = truth(folder), 0
    whole = time.time() - began
    for _ in range(kills):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        killed = spawn(folder)
        time.sleep(rng.uniform(0, whole))
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        after = spawn(folder)
        after.join()
        right += after.exitcode == 0 and is_right(folder, expected)
    return right


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=40)
    args = parser.parse_args()
    good = True
    for processes in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            right = race(Path(folder), processes, args.tries, args.pictures)
        print(f"{processes} processes at once: {right} of {args.tries} right")
        good &= right == args.tries
    with tempfile.TemporaryDirectory() as folder:
        right = kill(Path(folder), args.kills, args.pictures)
    print(f"killed while filling: {right} of {args.kills} right")
    sys.exit(not (good and right == args.kills))


if __name__ == "__main__":
    main()
