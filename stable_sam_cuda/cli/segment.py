"""``stable-sam segment``: a photograph and prompts in; masks, an overlay and a record out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from stable_sam_cuda import backends
from stable_sam_cuda.cli.comparison import Comparison, Prediction, compare_models, timed
from stable_sam_cuda.cli.console import say_note, say_plain, tell
from stable_sam_cuda.cli.errors import explain_user_errors, one_line
from stable_sam_cuda.cli.machine import package_versions
from stable_sam_cuda.cli.models import check_model, check_plugin
from stable_sam_cuda.cli.options import NO_PLUGIN
from stable_sam_cuda.cli.output import Outputs, Results
from stable_sam_cuda.cli.ownership import file_digest
from stable_sam_cuda.cli.photos import check_photos, read_photo, room_for
from stable_sam_cuda.cli.prompts import ObjectPrompt, fit_prompts, parse_prompts
from stable_sam_cuda.devices import pick_device
from stable_sam_cuda.notes import printable
from stable_sam_cuda.sam import load_sam, unstabilize
from stable_sam_cuda.visualize import Panel, compare, draw_sampling_points


def numbered(count: int, index: int) -> str:
    """``_1``, ``_2``, ... where there are several, nothing where there is one."""
    return f"_{index + 1}" if count > 1 else ""


@dataclass(frozen=True)
class Job:
    """A photograph that was looked at, its prompts, and the names of its results."""

    photo: Path
    digest: str
    prompts: list[ObjectPrompt]
    results: Results


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


def mask_suffixes(objects: int, candidates: int) -> list[list[str]]:
    """What the masks' names add to the photograph's: of every object those of its candidates."""
    return [
        [f"_mask{numbered(objects, index)}{numbered(candidates, candidate)}.png" for candidate in range(candidates)]
        for index in range(objects)
    ]


def sampling_suffixes(objects: int) -> list[str]:
    """The same for the pictures of the sampling points."""
    return [f"_sampling{numbered(objects, index)}.png" for index in range(objects)]


def write_sampling(results: Results, picture: Image.Image, comparison: Comparison) -> None:
    """Stage one picture an object: where Stable-SAM samples the features of its mask."""
    suffixes = sampling_suffixes(len(comparison.best))
    for suffix, prediction, offsets in zip(suffixes, comparison.best, comparison.offsets, strict=True):
        mask = prediction.masks[int(np.argmax(prediction.scores))]
        drawn = draw_sampling_points(picture, offsets, comparison.max_offset, mask)
        results.picture(results.stem + suffix, drawn)


def write_masks(results: Results, comparison: Comparison, prompts: Sequence[ObjectPrompt]) -> list[dict]:
    """Stage every mask as a PNG of 0 and 255; returns the record of each object."""
    objects = []
    suffixes = mask_suffixes(len(prompts), len(comparison.best[0].masks))
    for names, prompt, plain, best in zip(suffixes, prompts, comparison.sam, comparison.best, strict=True):
        masks = []
        for candidate, (mask, score) in enumerate(zip(best.masks, best.scores, strict=True)):
            name = results.stem + names[candidate]
            results.picture(name, Image.fromarray(mask.astype(np.uint8) * 255))
            scores = {"score": round(float(score), 6), "sam_score": round(float(plain.scores[candidate]), 6)}
            masks.append({"file": printable(name), **scores, "pixels": int(mask.sum())})
        objects.append({"box": prompt.box, "points": prompt.points, "labels": prompt.labels, "masks": masks})
    return objects


def summary(record: dict[str, Any], directory: Path) -> list[str]:
    """Plain lines, one a file."""
    place = printable(directory)
    masks = [mask for entry in record["objects"] for mask in entry["masks"]]
    lines = [
        f"mask: {Path(place, mask['file'])}  predicted IoU {mask['score']:.3f}, {mask['pixels']:,} pixels"
        for mask in masks
    ]
    timings = ", ".join(f"{name.replace('_', ' ')} {value:.0f} ms" for name, value in record["timings_ms"].items())
    backend = record["backend"] or "not used"
    return [
        *lines,
        f"overlay: {Path(place, record['overlay'])}",
        f"{record['model']} on {record['device']}, backend {backend}: {timings}",
    ]


def look_at(photo: Path, prompts: Sequence[ObjectPrompt], outputs: Outputs, *, multimask: bool, sampling: bool) -> Job:
    """Read a photograph, fit the prompts to it and claim the names of its results, before a model is loaded.

    Raises:
        ValueError, OSError: the photograph cannot be read, a prompt does not fit it, or a name is taken.
    """
    picture = read_photo(photo)
    digest = file_digest(photo)
    fitted, notes = fit_prompts(picture.size, prompts)
    for line in notes:
        say_note(f"{printable(photo)}: {line}")
    candidates = 3 if multimask else 1
    suffixes = [suffix for names in mask_suffixes(len(fitted), candidates) for suffix in names]
    suffixes += ["_overlay.png", *(sampling_suffixes(len(fitted)) if sampling else [])]
    source = {"verb": "segment", "photo_sha256": digest}
    return Job(photo, digest, fitted, outputs.claim(photo.stem, suffixes, source, room_for(picture)))


@explain_user_errors
def segment(
    photos: Annotated[
        list[Path],
        typer.Argument(metavar="PHOTO", help="Picture files of any usual kind; all get the same prompts."),
    ],
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0 Y0 X1 Y1",
            help="A box in pixels: left, top, right, bottom; spaces or commas between. Each box is one object. "
            "Repeatable.",
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X Y[:0]",
            help="A point on the object, or with :0 on the background. All points, and a "
            "box with them, tell of one object. Repeatable.",
        ),
    ] = None,
    box_format: Annotated[
        str, typer.Option(help="What the numbers of --box are: xyxy, or xywh (left, top, width, height).")
    ] = "xyxy",
    model: Annotated[str, typer.Option(help="Base model: sam_lite, vit_b, vit_l or vit_h.")] = "sam_lite",
    checkpoint: Annotated[Path | None, typer.Option(help="Local weights of the base model.")] = None,
    plugin: Annotated[
        str, typer.Option(help="auto (shipped for the model), a shipped plugin's name, a .safetensors file, or none.")
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("."),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of these names that are not earlier results of PHOTO.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, cuda, triton, cpu or reference.")] = "auto",
    multimask: Annotated[bool, typer.Option("--multimask", help="Three masks of different extent an object.")] = False,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Also draw where Stable-SAM samples the features.")
    ] = False,
) -> None:
    """Segment objects in photographs from boxes and points, with SAM and with Stable-SAM.

    Writes PHOTO_mask.png (0 and 255; numbered where there are several), PHOTO_overlay.png with both models side by
    side, and PHOTO.json with scores, timings and versions; of a photograph all of them or, after an error, none.
    Earlier results of the same photograph are replaced; other files of these names are not, without --overwrite.
    """
    if sampling and plugin == NO_PLUGIN:
        raise ValueError("--sampling: expected a plugin, got --plugin none")
    prompts = parse_prompts(box or [], point or [], box_format)
    where = pick_device(device)
    chosen = None if plugin == NO_PLUGIN else backends.choose(backend, where, torch.float32)
    if chosen is None:
        backends.parse(backend)
    check_model(model, checkpoint)
    check_plugin(model, plugin)
    check_photos(photos)
    with Outputs(out, overwrite=overwrite, keep=photos) as outputs:
        jobs = []
        for photo in photos:
            try:
                jobs.append(look_at(photo, prompts, outputs, multimask=multimask, sampling=sampling))
            except (ValueError, OSError) as error:
                if len(photos) == 1 or printable(photo) in str(error):
                    raise
                raise ValueError(f"{printable(photo)}: {one_line(error)}") from error
        sam, load_time = timed(lambda: load_sam(model, checkpoint, device=where), where)
        for job in jobs:
            picture = read_photo(job.photo, job.digest)
            comparison = compare_models(
                sam,
                None if plugin == NO_PLUGIN else plugin,
                picture,
                job.prompts,
                backend=backend,
                multimask=multimask,
            )
            if comparison.stable is not None:
                unstabilize(sam)  # the next photograph is SAM's first
            results = job.results
            overlay_name = f"{results.stem}_overlay.png"
            results.picture(overlay_name, overlay(picture, comparison, job.prompts))
            if sampling:
                write_sampling(results, picture, comparison)
            record = {
                "photo": printable(job.photo),
                "image_size": {"width": picture.width, "height": picture.height},
                "model": model,
                "checkpoint": checkpoint and printable(checkpoint),
                "plugin": printable(plugin),
                "device": str(where),
                "backend": chosen and chosen.value,
                "attention": comparison.attention,
                "multimask": multimask,
                "objects": write_masks(results, comparison, job.prompts),
                "overlay": printable(overlay_name),
                "timings_ms": {"model_loading": load_time, **comparison.milliseconds},
                "versions": package_versions(),
            }
            results.publish(record)
            for name in results.removed:
                say_plain(f"removed {printable(out / name)}, of an earlier run on this photograph")
            tell(*summary(record, out))
