"""The same object from many sloppy boxes: how far do SAM's masks differ, how far Stable-SAM's?

Prints the stability ST of both (1: every box gives the same mask) and leaves a picture of the first boxes:
one row a box, SAM on the left, Stable-SAM on the right.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from stable_sam_cuda.evaluation.metrics import stability
from stable_sam_cuda.picture import read_picture
from stable_sam_cuda.sam import StableSamPredictor, load_sam, stabilize
from stable_sam_cuda.training.prompts import noisy_boxes
from stable_sam_cuda.visualize import Panel, compare

EXAMPLES = Path(__file__).parent
CUP = (173.0, 18.0, 410.0, 312.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photo", type=Path, default=EXAMPLES / "coffee.png")
    parser.add_argument("--box", type=float, nargs=4, default=CUP, metavar=("X0", "Y0", "X1", "Y1"), help="good box")
    parser.add_argument("--noise", type=float, default=0.4, help="scale of the boxes' noise; 0.4 is the paper's")
    parser.add_argument("--count", type=int, default=20, help="number of boxes; 20 is the paper's")
    parser.add_argument("--rows", type=int, default=4, help="number of boxes to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="sam_lite")
    parser.add_argument("--plugin", default="auto")
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    return parser.parse_args()


def predict(predictor: StableSamPredictor, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks (B, H, W) bool and scores (B,) of the boxes (B, 4)."""
    predictions = predictor.predict_batch([{"box": box} for box in boxes], multimask_output=False)
    return np.stack([masks[0] for masks, _, _ in predictions]), np.array([scores[0] for _, scores, _ in predictions])


def main() -> None:
    arguments = parse_arguments()
    photo = read_picture(arguments.photo)
    generator = torch.Generator().manual_seed(arguments.seed)
    good_boxes = torch.tensor([arguments.box]).expand(arguments.count, 4)
    boxes = noisy_boxes(good_boxes, photo.height, photo.width, generator, arguments.noise).numpy()

    sam = load_sam(arguments.model)
    predictor = StableSamPredictor(sam)
    predictor.set_image(np.asarray(photo))
    results = {"SAM": predict(predictor, boxes)}
    stabilize(sam, arguments.plugin)
    results["Stable-SAM"] = predict(predictor, boxes)  # the image embedding is the same: the encoder is SAM's own

    table = Table(title=f"{arguments.photo.name}: {arguments.count} boxes with noise of scale {arguments.noise}")
    table.add_column("model")
    table.add_column("stability ST", justify="right")
    for name, (masks, _) in results.items():
        table.add_row(name, f"{stability(torch.from_numpy(masks)).item():.3f}")
    Console().print(table)

    rows = [
        [
            Panel(name, f"sloppy box {index + 1} · predicted IoU {scores[index]:.2f}", [masks[index]], [boxes[index]])
            for name, (masks, scores) in results.items()
        ]
        for index in range(min(arguments.rows, arguments.count))
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.photo.stem}_sloppy_boxes.png"
    compare(photo, rows).save(path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
