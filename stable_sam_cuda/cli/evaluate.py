"""``stable-sam evaluate``: the paper's protocol on pictures with masks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from stable_sam_cuda.cli.errors import explain_user_errors


@explain_user_errors
def evaluate(
    data: Annotated[Path, typer.Option(help="Pictures with masks: folders, or a tree of them, or a COCO file.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.csv.")],
    model: Annotated[str, typer.Option(help="sam_lite, vit_b, vit_l or vit_h.")] = "sam_lite",
    checkpoint: Annotated[Path | None, typer.Option(help="A local checkpoint of the model.")] = None,
    plugin: Annotated[
        str, typer.Option(help="auto, none, the name or the path of a plugin, or of a baseline's weights.")
    ] = "auto",
    split: Annotated[str | None, typer.Option(help="A split named in the data's splits.json.")] = None,
    layout: Annotated[str, typer.Option(help="How DATA is laid out: auto, folders, mixed or coco.")] = "auto",
    prompts: Annotated[str, typer.Option(help="Prompt kinds, by commas.")] = "gt_box,noisy_box,1_point,3_points",
    draws: Annotated[int, typer.Option(help="Random prompts a kind, for each object.")] = 20,
    every: Annotated[int, typer.Option(help="Take every n-th picture only.", min=1)] = 1,
    average_precision: Annotated[
        bool, typer.Option(help="Also COCO's mAP, for gt_box, box_50_60 and box_60_70; DATA is a COCO file.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """mIoU, mBIoU and stability ST of a model, by prompt kind and set; under ``torchrun``, by all its processes."""
    from stable_sam_cuda.cli.samples import usable_samples
    from stable_sam_cuda.evaluation.protocol import evaluate as run_protocol
    from stable_sam_cuda.evaluation.report import paper_table, precision_table, write_report
    from stable_sam_cuda.evaluation.sharding import gathered, own_device, own_share, process_group, rank
    from stable_sam_cuda.sam import StableSamPredictor, load_sam
    from stable_sam_cuda.training.dataset import find_masked_images
    from stable_sam_cuda.training.method_file import load_method

    with process_group():
        first = rank() == 0
        console = Console(quiet=not first)
        sam = load_sam(model, checkpoint=checkpoint, device=own_device(device))
        if plugin != "none":
            load_method(sam, plugin)
        samples = usable_samples(find_masked_images(data, split, layout)[::every], console)
        kinds = [kind.strip() for kind in prompts.split(",")]
        predictor = StableSamPredictor(sam)
        by_picture = [
            run_protocol(predictor, [sample], kinds, draws=draws, seed=seed)
            for sample in track(own_share(samples), "evaluating", console=console)
        ]
        results = gathered(by_picture)
    if not first:
        return
    description: dict[str, object] = {
        "model": model,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "plugin": plugin,
        "split": split,
        "draws": draws,
        "every": every,
        "seed": seed,
        "pictures": len(samples),
    }
    if average_precision:
        from stable_sam_cuda.evaluation.coco import precision_by_kind

        with console.status("average precision"):
            precisions = precision_by_kind(predictor, samples, kinds, seed=seed)
        if not precisions:
            raise ValueError(f"prompts: expected gt_box, box_50_60 or box_60_70 for --average-precision, got {prompts}")
        description["average_precision"] = precisions
        console.print(precision_table(precisions))
    write_report(results, out, description)
    console.print(paper_table(results, f"{model}, plugin {plugin}, {draws} draws"))
