"""``stable-sam segment``: a photograph and prompts in; masks, an overlay and a record out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from stable_sam_cuda import backends
from stable_sam_cuda.cli.comparison import Comparison, Prediction, compare_models, timed
from stable_sam_cuda.cli.errors import explain_user_errors
from stable_sam_cuda.cli.machine import package_versions, pick_device
from stable_sam_cuda.cli.options import NO_PLUGIN
from stable_sam_cuda.cli.output import Outputs
from stable_sam_cuda.cli.prompts import ObjectPrompt, make_prompts
from stable_sam_cuda.picture import read_picture
from stable_sam_cuda.sam import load_sam
from stable_sam_cuda.visualize import Panel, compare, draw_sampling_points


def numbered(count: int, index: int) -> str:
    """``_1``, ``_2``, ... where there are several, nothing where there is one."""
    return f"_{index + 1}" if count > 1 else ""


def panel(title: str, predictions: Sequence[Prediction], prompts: Sequence[ObjectPrompt]) -> Panel:
    """The best mask of every object and the prompts."""
    best = [int(np.argmax(prediction.scores)) for prediction in predictions]
    scores = [prediction.scores[index] for prediction, index in zip(predictions, best, strict=True)]
    return Panel(
        title,
        "predicted IoU " + ", ".join(f"{score:.2f}" for score in scores),
        masks=[prediction.masks[index] for prediction, index in zip(predictions, best, strict=True)],
        boxes=[prompt.box for prompt in prompts if prompt.box is not None],
        points=[point for prompt in prompts for point in prompt.points],
        labels=[label for prompt in prompts for label in prompt.labels],
    )


def overlay(picture: Image.Image, comparison: Comparison, prompts: Sequence[ObjectPrompt]) -> Image.Image:
    """SAM and, where it ran, Stable-SAM side by side."""
    panels = [panel("SAM", comparison.sam, prompts)]
    if comparison.stable is not None:
        panels.append(panel("Stable-SAM", comparison.stable, prompts))
    return compare(picture, [panels])


def write_sampling(outputs: Outputs, stem: str, picture: Image.Image, comparison: Comparison) -> None:
    """Stage one picture an object: where Stable-SAM samples the features of its mask."""
    for index, (prediction, offsets) in enumerate(zip(comparison.best, comparison.offsets, strict=True)):
        mask = prediction.masks[int(np.argmax(prediction.scores))]
        drawn = draw_sampling_points(picture, offsets, comparison.max_offset, mask)
        outputs.picture(f"{stem}_sampling{numbered(len(comparison.best), index)}.png", drawn)


def write_masks(outputs: Outputs, stem: str, comparison: Comparison, prompts: Sequence[ObjectPrompt]) -> list[dict]:
    """Stage every mask as a PNG of 0 and 255; returns the record of each object."""
    objects = []
    for index, (prompt, plain, best) in enumerate(zip(prompts, comparison.sam, comparison.best, strict=True)):
        masks = []
        for candidate, (mask, score) in enumerate(zip(best.masks, best.scores, strict=True)):
            name = f"{stem}_mask{numbered(len(prompts), index)}{numbered(len(best.masks), candidate)}.png"
            outputs.picture(name, Image.fromarray(mask.astype(np.uint8) * 255))
            scores = {"score": round(float(score), 6), "sam_score": round(float(plain.scores[candidate]), 6)}
            masks.append({"file": name, **scores, "pixels": int(mask.sum())})
        objects.append({"box": prompt.box, "points": prompt.points, "labels": prompt.labels, "masks": masks})
    return objects


def print_summary(record: dict[str, Any], directory: Path) -> None:
    """Plain lines, one a file, so that a path is never broken."""
    for mask in (mask for entry in record["objects"] for mask in entry["masks"]):
        typer.echo(f"mask: {directory / mask['file']}  predicted IoU {mask['score']:.3f}, {mask['pixels']:,} pixels")
    typer.echo(f"overlay: {directory / record['overlay']}")
    timings = ", ".join(f"{name.replace('_', ' ')} {value:.0f} ms" for name, value in record["timings_ms"].items())
    backend = record["backend"] or "not used"
    typer.echo(f"{record['model']} on {record['device']}, backend {backend}: {timings}")


@explain_user_errors
def segment(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="A picture file of any usual kind.")],
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0 Y0 X1 Y1", help="A box in pixels; each box is one object. Repeatable."),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X Y[:0]",
            help="A point on the object, or with :0 on the background. All points, and a "
            "box with them, tell of one object. Repeatable.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Base model: sam_lite, vit_b, vit_l or vit_h.")] = "sam_lite",
    checkpoint: Annotated[Path | None, typer.Option(help="Local weights of the base model.")] = None,
    plugin: Annotated[
        str, typer.Option(help="auto (shipped for the model), a shipped plugin's name, a .safetensors file, or none.")
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("."),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, cuda, triton, cpu or reference.")] = "auto",
    multimask: Annotated[bool, typer.Option("--multimask", help="Three masks of different extent an object.")] = False,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Also draw where Stable-SAM samples the features.")
    ] = False,
) -> None:
    """Segment objects in a photograph from boxes and points, with SAM and with Stable-SAM.

    Writes PHOTO_mask.png (0 and 255; numbered where there are several), PHOTO_overlay.png with both models side by
    side, and PHOTO.json with scores, timings and versions; all of them or, after an error, none.
    """
    if sampling and plugin == NO_PLUGIN:
        raise ValueError("--sampling: expected a plugin, got --plugin none")
    where = pick_device(device)
    chosen = None if plugin == NO_PLUGIN else backends.choose(backend, where, torch.float32)
    picture = read_picture(photo)
    prompts = make_prompts(picture.size, box or [], point or [])
    with Outputs(out) as outputs:
        sam, load_time = timed(lambda: load_sam(model, checkpoint, device=where), where)
        comparison = compare_models(
            sam,
            None if plugin == NO_PLUGIN else plugin,
            picture,
            prompts,
            backend=backend,
            multimask=multimask,
        )
        stem = photo.stem
        outputs.picture(f"{stem}_overlay.png", overlay(picture, comparison, prompts))
        if sampling:
            write_sampling(outputs, stem, picture, comparison)
        record = {
            "photo": str(photo),
            "image_size": {"width": picture.width, "height": picture.height},
            "model": model,
            "checkpoint": checkpoint and str(checkpoint),
            "plugin": plugin,
            "device": str(where),
            "backend": chosen and chosen.value,
            "attention": comparison.attention,
            "multimask": multimask,
            "objects": write_masks(outputs, stem, comparison, prompts),
            "overlay": f"{stem}_overlay.png",
            "timings_ms": {"model_loading": load_time, **comparison.milliseconds},
            "versions": package_versions(),
        }
        outputs.record(f"{stem}.json", record)
    print_summary(record, out)
