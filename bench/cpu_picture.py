"""Seconds of one picture and one box with ``sam_lite`` on a CPU: encoder and decoder, SAM's and Stable-SAM's.

    python bench/cpu_picture.py [--rounds 5] [--threads 2] [--out FILE]

A random picture of 1024 x 768 pixels, through the predictors that users have, shrinking and upscaling included; the
models are loaded and have answered before. The box's logits are compared with those of segment_anything's own predictor
first. Contestants take turns. Writes bench/results/cpu/<date>-<commit>-picture.json.
"""

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from segment_anything import SamPredictor
from timing import machine
from turns import cpu_facts, summary, time_in_turns, write_record

from stable_sam_cuda import StableSamPredictor, load_sam, stabilize

HEIGHT, WIDTH = 768, 1024
BOX = np.array([200, 150, 800, 600])
LARGEST_ERROR = 1e-3  # of the logits, beside their rms


def answer(predictor: SamPredictor, picture: np.ndarray) -> np.ndarray:
    """Low-resolution logits (1, h, w) of the box, from the pixels on."""
    predictor.set_image(picture)
    return predictor.predict(box=BOX, multimask_output=False)[2]


def verify(predictors: dict[str, SamPredictor], picture: np.ndarray) -> dict[str, float]:
    """Largest error of the logits against segment_anything's predictor of the same model, by their rms."""
    errors = {}
    for name, predictor in predictors.items():
        exact, found = answer(SamPredictor(predictor.model), picture), answer(predictor, picture)
        errors[name] = float(np.abs(found - exact).max() / np.sqrt(np.square(exact).mean()))
        if not errors[name] < LARGEST_ERROR:
            raise SystemExit(f"{name} is wrong: error {errors[name]}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file, in place of the one named above")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, object] = {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%MZ}"}
    record |= {**machine(torch.device("cpu")), **cpu_facts(), "results": []}
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    predictors = {
        "SAM": StableSamPredictor(load_sam("sam_lite")),
        "Stable-SAM": StableSamPredictor(stabilize(load_sam("sam_lite"), "auto")),
    }
    errors = verify(predictors, picture)
    steps: dict[str, Callable[[SamPredictor], Callable[[], object]]] = {
        "encoder": lambda predictor: lambda: predictor.set_image(picture),
        "encoder and decoder": lambda predictor: lambda: answer(predictor, picture),
    }
    for what, step in steps.items():
        turns = {name: step(predictor) for name, predictor in predictors.items()}
        times = time_in_turns(turns, options.rounds, 1)
        for name, milliseconds in times.items():
            facts = summary(times["SAM"], milliseconds)
            facts["times_plain_sam"] = facts.pop("times_slower_than_own")
            record["results"].append({"what": what, "prompts": 1, "contestant": name, **facts, "error": errors[name]})
            print(f"{what:20} {name:11} {facts['median_ms']:7.0f} ms  {facts['times_plain_sam']:.2f} x SAM")
    write_record(record, options.out, behind="-picture")


if __name__ == "__main__":
    main()
