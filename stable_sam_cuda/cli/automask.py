"""``stable-sam automask``: a photograph in; masks of everything in it, an overlay and a record out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.amg import rle_to_mask

from stable_sam_cuda import backends
from stable_sam_cuda.cli.comparison import attention_path, timed
from stable_sam_cuda.cli.console import say_plain, tell
from stable_sam_cuda.cli.errors import explain_user_errors
from stable_sam_cuda.cli.machine import package_versions
from stable_sam_cuda.cli.models import check_model, check_plugin
from stable_sam_cuda.cli.options import NO_PLUGIN
from stable_sam_cuda.cli.output import Outputs
from stable_sam_cuda.cli.ownership import file_digest
from stable_sam_cuda.cli.photos import check_photos, read_photo, room_for
from stable_sam_cuda.cli.prompts import ObjectPrompt
from stable_sam_cuda.devices import pick_device
from stable_sam_cuda.notes import printable
from stable_sam_cuda.progress import progress_shown
from stable_sam_cuda.sam import StableSamAutomaticMaskGenerator, load_sam, plugin_of, stabilize
from stable_sam_cuda.sam.base_models import mask_thresholds
from stable_sam_cuda.visualize import draw_id_map

ONE_POINT = ObjectPrompt(points=((0.0, 0.0),), labels=(1,))

# Masks of a batch are computed at the photograph's size, three a point: so many pixels of logits at a time.
MOST_PIXELS = 2**27
MOST_POINTS_PER_BATCH = 64

# An id is 16 bits wide, and a point gives up to three objects.
MOST_POINTS_PER_SIDE = 147


def points_per_batch(picture: Image.Image) -> int:
    """As many points at a time as the photograph's size allows in memory."""
    return max(1, min(MOST_POINTS_PER_BATCH, MOST_PIXELS // (3 * picture.width * picture.height)))


def id_map(picture: Image.Image, records: Sequence[dict[str, Any]]) -> np.ndarray:
    """(H, W) of 16 bits: the number of the object, 0 for none; where objects overlap, the later one."""
    ids = np.zeros((picture.height, picture.width), dtype=np.uint16)
    for number, record in enumerate(records, start=1):
        ids[rle_to_mask(record["segmentation"])] = number
    return ids


def described(number: int, record: dict[str, Any], with_rle: bool) -> dict[str, Any]:
    """An object's entry in the JSON."""
    entry = {
        "id": number,
        "bbox": [float(value) for value in record["bbox"]],  # x, y, width, height, as COCO has it
        "point": record["point_coords"][0],
        "pixels": int(record["area"]),
        "score": round(record["predicted_iou"], 6),
        "stability": round(record["stability_score"], 6),
    }
    return entry | ({"segmentation": record["segmentation"]} if with_rle else {})


def load(
    model: str, checkpoint: Path | None, plugin: str, device: torch.device, backend: str
) -> tuple[Sam, str | None, str | None]:
    """The model, stabilised unless there is no plugin; its backend and the path of its attention."""
    chosen = None if plugin == NO_PLUGIN else backends.choose(backend, device, torch.float32)
    sam = load_sam(model, checkpoint, device=device)
    if chosen is None:
        return sam, None, None
    plugin_of(stabilize(sam, plugin)).backend = backend
    return sam, chosen.value, attention_path(sam, ONE_POINT)


@explain_user_errors
def automask(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="A picture file of any usual kind.")],
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("."),
    points_per_side: Annotated[int, typer.Option(help="Side of the grid of points that are prompts.")] = 32,
    min_score: Annotated[
        float | None, typer.Option(help="Least predicted IoU of a mask, 0 to 1. Default: 0.88; sam_lite 0.5.")
    ] = None,
    min_stability: Annotated[
        float | None,
        typer.Option(help="Least stability of a mask under other cuts, 0 to 1. Default: 0.95; sam_lite 0.6."),
    ] = None,
    max_overlap: Annotated[float, typer.Option(help="Largest IoU of the boxes of two masks, 0 to 1.")] = 0.7,
    crop_layers: Annotated[int, typer.Option(help="Also search crops: so many layers, each of smaller ones.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of these names that are not earlier results of PHOTO.")
    ] = False,
    rle: Annotated[
        bool, typer.Option("--rle", help="Also every whole mask as COCO's run lengths, in the JSON.")
    ] = False,
    model: Annotated[str, typer.Option(help="Base model: sam_lite, vit_b, vit_l or vit_h.")] = "sam_lite",
    checkpoint: Annotated[Path | None, typer.Option(help="Local weights of the base model.")] = None,
    plugin: Annotated[
        str, typer.Option(help="auto (shipped for the model), a shipped plugin's name, a .safetensors file, or none.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, cuda, triton, cpu or reference.")] = "auto",
) -> None:
    """Segment everything in a photograph, from a grid of points.

    Writes PHOTO_automask_ids.png (16 bits; each object's number, smaller ones on top, 0 for none),
    PHOTO_automask_overlay.png, and PHOTO_automask.json with scores, timings and versions; all of them or, after an
    error, none. Earlier results of the same photograph are replaced; other files of these names are not, without
    --overwrite.
    """
    if not 1 <= points_per_side <= MOST_POINTS_PER_SIDE:
        raise ValueError(f"--points-per-side: expected 1 to {MOST_POINTS_PER_SIDE}, got {points_per_side}")
    for option, value in {
        "--min-score": min_score,
        "--min-stability": min_stability,
        "--max-overlap": max_overlap,
    }.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{option}: expected a number from 0 to 1, got {value:g}")
    if not 0 <= crop_layers <= 3:
        raise ValueError(f"--crop-layers: expected 0 to 3, got {crop_layers}")
    where = pick_device(device)
    if plugin == NO_PLUGIN:
        backends.parse(backend)
    else:
        backends.choose(backend, where, torch.float32)
    check_model(model, checkpoint)
    check_plugin(model, plugin)
    check_photos([photo])
    with Outputs(out, overwrite=overwrite, keep=[photo]) as outputs:
        picture = read_photo(photo)
        digest = file_digest(photo)
        stem = f"{photo.stem}_automask"
        source = {"verb": "automask", "photo_sha256": digest}
        results = outputs.claim(stem, ["_ids.png", "_overlay.png"], source, room_for(picture))
        (sam, chosen, attention), load_time = timed(lambda: load(model, checkpoint, plugin, where, backend), where)
        usual_score, usual_stability = mask_thresholds(sam)
        min_score = usual_score if min_score is None else min_score
        min_stability = usual_stability if min_stability is None else min_stability
        with progress_shown(transient=True) as progress:
            done = 0

            def advance(points: int, total: int) -> None:
                nonlocal done
                if done == 0:
                    progress.begin("points", total)
                progress.advance(points - done)
                done = points

            generator = StableSamAutomaticMaskGenerator(
                sam,
                points_per_side,
                progress=advance,
                points_per_batch=points_per_batch(picture),
                pred_iou_thresh=min_score,
                stability_score_thresh=min_stability,
                box_nms_thresh=max_overlap,
                crop_n_layers=crop_layers,
                output_mode="uncompressed_rle",
            )
            records, mask_time = timed(lambda: generator.generate(np.array(picture)), where)
        records.sort(key=lambda record: record["area"], reverse=True)
        ids = id_map(picture, records)
        ids_name, overlay_name = f"{stem}_ids.png", f"{stem}_overlay.png"
        results.picture(ids_name, Image.fromarray(ids))
        results.picture(overlay_name, draw_id_map(picture, ids))
        record = {
            "photo": printable(photo),
            "image_size": {"width": picture.width, "height": picture.height},
            "model": model,
            "checkpoint": checkpoint and printable(checkpoint),
            "plugin": printable(plugin),
            "device": str(where),
            "backend": chosen,
            "attention": attention,
            "points_per_side": points_per_side,
            "min_score": min_score,
            "min_stability": min_stability,
            "max_overlap": max_overlap,
            "crop_layers": crop_layers,
            "ids": printable(ids_name),
            "overlay": printable(overlay_name),
            "objects": [described(number, entry, rle) for number, entry in enumerate(records, start=1)],
            "timings_ms": {"model_loading": load_time, "masks": mask_time},
            "versions": package_versions(),
        }
        results.publish(record)
        for name in results.removed:
            say_plain(f"removed {printable(out / name)}, of an earlier run on this photograph")
    tell(
        f"ids: {printable(out / ids_name)}  {len(records)} objects",
        f"overlay: {printable(out / overlay_name)}",
        f"{model} on {where}, backend {chosen or 'not used'}: masks {mask_time:.0f} ms",
    )
