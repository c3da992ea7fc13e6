"""Pictures of the base and a plugin on the objects where they differ most, and where both fail: to be looked at.

    python study/pictures.py --data DATA --base work/sam_lite-0/test --plugin work/stable_long-0/test
                             --weights work/stable_long-0/plugin.safetensors [--kind noisy_box] [--count 6] --out FOLDER

``--base`` and ``--plugin`` are folders of two evaluations of one split (``stable-sam evaluate``). Writes gains.jpg,
losses.jpg and failures.jpg: a row an object, its true mask, then both models' masks for the first prompt that the
evaluation drew. The photographs' terms are for research: nothing of this goes into the repository.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stable_sam_cuda.data.dataset import choose_samples, object_masks
from stable_sam_cuda.data.digests import seed_of
from stable_sam_cuda.data.prompts import draw_prompts
from stable_sam_cuda.evaluation.metrics import mask_iou
from stable_sam_cuda.evaluation.protocol import KIND_NAMES
from stable_sam_cuda.sam import StableSamPredictor, load_sam
from stable_sam_cuda.training.methods import load_method
from stable_sam_cuda.visualize.panel import Panel, compare

Key = tuple[str, int]  # a picture's name and an object's index


def values(folder: Path, kind: str) -> tuple[dict, dict[Key, float]]:
    """What an evaluation was, and each object's mean IoU."""
    results = json.loads((folder / "results.json").read_text())
    return results, {
        (one["picture"], one["object_index"]): one["iou"] for one in results["objects"] if one["kind"] == kind
    }


def chosen(before: dict[Key, float], after: dict[Key, float], count: int) -> dict[str, list[Key]]:
    """The objects of each sheet, one a picture: largest gains, largest losses, least IoU after."""
    orders = {
        "gains": lambda key: before[key] - after[key],
        "losses": lambda key: after[key] - before[key],
        "failures": lambda key: after[key],
    }
    sheets = {}
    for name, order in orders.items():
        of_picture: dict[str, Key] = {}
        for key in sorted(after, key=order):
            of_picture.setdefault(key[0], key)
        sheets[name] = list(of_picture.values())[:count]
    return sheets


class Models:
    """The base, and the same with what ``weights`` hold."""

    def __init__(self, weights: Path) -> None:
        stable = load_sam("sam_lite")
        load_method(stable, weights)
        self.predictors = {"SAM": StableSamPredictor(load_sam("sam_lite")), "Stable-SAM": StableSamPredictor(stable)}

    @torch.inference_mode()
    def row(self, image: np.ndarray, mask: np.ndarray, kind: str, seed: int) -> list[Panel]:
        """Panels of the truth and of both models for the first prompt of the kind."""
        target = torch.from_numpy(mask)[None]
        prompts = draw_prompts(
            KIND_NAMES[kind], target, torch.zeros(1, dtype=torch.long), torch.Generator().manual_seed(seed)
        )
        boxes = () if prompts.boxes is None else prompts.boxes.tolist()
        points = () if prompts.points is None else prompts.points[0].tolist()
        shown = {"boxes": boxes, "points": points, "labels": [1] * len(points)}
        panels = [Panel("true mask", masks=(mask,), **shown)]
        for name, predictor in self.predictors.items():
            predictor.set_image(image)
            found, _, _ = predictor.predict(
                point_coords=np.array(points) if points else None,
                point_labels=np.ones(len(points)) if points else None,
                box=np.array(boxes[0]) if boxes else None,
                multimask_output=False,
            )
            overlap = mask_iou(torch.from_numpy(found), target).item()
            panels.append(Panel(name, f"IoU {overlap:.2f}", masks=(found[0],), **shown))
        return panels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base's evaluation")
    parser.add_argument("--plugin", type=Path, required=True, help="folder of the plugin's evaluation")
    parser.add_argument("--weights", type=Path, required=True, help="the plugin")
    parser.add_argument("--kind", default="noisy_box", choices=list(KIND_NAMES))
    parser.add_argument("--count", type=int, default=6, help="objects a sheet")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    results, before = values(options.base, options.kind)
    _, after = values(options.plugin, options.kind)
    if before.keys() != after.keys():
        parser.error("base, plugin: expected evaluations of the same objects")
    samples = {sample.name: sample for sample in choose_samples(options.data, results["split"])}
    models = Models(options.weights)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, keys in chosen(before, after, options.count).items():
        pictures = []
        for picture, index in keys:
            image, ids = samples[picture].load()
            seed = seed_of(results["seed"], picture, index, options.kind)
            row = models.row(image, object_masks(ids)[index], options.kind, seed)
            change = f"{picture}, mean IoU {before[picture, index]:.2f} to {after[picture, index]:.2f}"
            row[0] = Panel(row[0].title, change, row[0].masks, row[0].boxes, row[0].points, row[0].labels)
            pictures.append(compare(Image.fromarray(image), [row], smallest=360, largest=360))
        sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
        for place, drawn in enumerate(pictures):
            sheet.paste(drawn, (0, sum(p.height for p in pictures[:place])))
        sheet.save(options.out / f"{name}.jpg", quality=88)
        print(options.out / f"{name}.jpg")


if __name__ == "__main__":
    main()
