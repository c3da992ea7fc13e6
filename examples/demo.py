"""The same object from many sloppy boxes: how far do SAM's masks differ, how far Stable-SAM's?

Prints the stability ST of both (1: every box gives the same mask) and leaves one picture a photograph:
one row a box, SAM on the left, Stable-SAM on the right.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from stable_sam_cuda.data.picture import read_picture
from stable_sam_cuda.data.prompts import noisy_boxes
from stable_sam_cuda.evaluation.metrics import stability
from stable_sam_cuda.sam import StableSamPredictor, load_sam, stabilize, unstabilize
from stable_sam_cuda.visualize import Panel, compare

FOLDER = Path(__file__).parent
GOOD_BOXES = {
    "coffee.png": (77.0, 18.0, 481.0, 389.0),  # the cup on its saucer
    "chelsea.png": (8.0, 0.0, 405.0, 299.0),  # the cat's head
    "astronaut.png": (20.0, 14.0, 362.0, 511.0),  # the astronaut
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, default=0.4, help="scale of the boxes' noise; 0.4 is the paper's")
    parser.add_argument("--count", type=int, default=12, help="boxes a photograph; the paper takes 20")
    parser.add_argument("--rows", type=int, default=4, help="boxes to draw: the first ones, whatever they give")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="sam_lite")
    parser.add_argument("--checkpoint", type=Path, help="local weights of the base model")
    parser.add_argument("--plugin", default="auto")
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    return parser.parse_args()


def predict(predictor: StableSamPredictor, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks (B, H, W) bool and scores (B,) of the boxes (B, 4)."""
    predictions = predictor.predict_batch([{"box": box} for box in boxes], multimask_output=False)
    return np.stack([masks[0] for masks, _, _ in predictions]), np.array([scores[0] for _, scores, _ in predictions])


def draw(photo: Image.Image, boxes: np.ndarray, results: dict[str, tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    """One row a box, one column a model."""
    return compare(
        photo,
        [
            [
                Panel(name, f"sloppy box {index + 1} · predicted IoU {scores[index]:.2f}", [masks[index]], [box])
                for name, (masks, scores) in results.items()
            ]
            for index, box in enumerate(boxes)
        ],
    )


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sam = load_sam(arguments.model, arguments.checkpoint)
    predictor = StableSamPredictor(sam)
    table = Table(title="Stability ST of the masks", caption=f"{arguments.count} boxes, noise {arguments.noise}")
    for heading in ("photograph", "SAM", "Stable-SAM"):
        table.add_column(heading, justify="left" if heading == "photograph" else "right")
    pictures = []
    for name, good_box in GOOD_BOXES.items():
        photo = read_picture(FOLDER / name)
        generator = torch.Generator().manual_seed(arguments.seed)
        good_boxes = torch.tensor([good_box]).expand(arguments.count, 4)
        boxes = noisy_boxes(good_boxes, photo.height, photo.width, generator, arguments.noise).numpy()

        predictor.set_image(np.asarray(photo))
        results = {"SAM": predict(predictor, boxes)}
        stabilize(sam, arguments.plugin)
        results["Stable-SAM"] = predict(predictor, boxes)  # on the same embedding: the encoder is SAM's own
        unstabilize(sam)

        table.add_row(name, *(f"{stability(torch.from_numpy(masks)).item():.3f}" for masks, _ in results.values()))
        pictures.append(arguments.out / f"{Path(name).stem}_sloppy_boxes.png")
        draw(photo, boxes[: arguments.rows], results).save(pictures[-1])
    Console().print(table)
    for picture in pictures:
        print(f"picture: {picture}")


if __name__ == "__main__":
    main()
