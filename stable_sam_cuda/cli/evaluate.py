"""``stable-sam evaluate``: the paper's protocol on pictures with masks."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from stable_sam_cuda.cli.console import table_lines, tell
from stable_sam_cuda.cli.errors import explain_user_errors
from stable_sam_cuda.cli.models import check_model, check_plugin
from stable_sam_cuda.cli.options import NO_PLUGIN
from stable_sam_cuda.cli.output import Outputs
from stable_sam_cuda.cli.ownership import file_digest
from stable_sam_cuda.cli.samples import check_data, usable_samples
from stable_sam_cuda.devices import own_device, pick_device
from stable_sam_cuda.notes import printable
from stable_sam_cuda.progress import progress_shown

ROOM = 2**16  # bytes


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
    masks: Annotated[
        str, typer.Option(help="What a mask file's values mean: auto (decided by set), binary, instances or void.")
    ] = "auto",
    crowds: Annotated[str, typer.Option(help="COCO annotations with iscrowd 1: skip, or use as objects.")] = "skip",
    prompts: Annotated[str, typer.Option(help="Prompt kinds, by commas.")] = "gt_box,noisy_box,1_point,3_points",
    draws: Annotated[int, typer.Option(help="Random prompts a kind, for each object.", min=1)] = 20,
    every: Annotated[int, typer.Option(help="Take every n-th picture only.", min=1)] = 1,
    limit: Annotated[int | None, typer.Option(help="So many pictures only, drawn with the seed.", min=1)] = None,
    average_precision: Annotated[
        bool,
        typer.Option(help="Also COCO's mAP, for gt_box, box_50_60 and box_60_70; DATA is a COCO file."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of an evaluation with other settings.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """mIoU, mBIoU and stability ST of a model, by prompt kind and set; under ``torchrun``, by all its processes.

    Results of an earlier evaluation with the same settings are replaced; others are not, without --overwrite.
    """
    check_data(data, split)
    check_model(model, checkpoint)
    check_plugin(model, plugin)
    from stable_sam_cuda.data.dataset import choose_samples
    from stable_sam_cuda.data.digests import content_digest
    from stable_sam_cuda.data.sharding import gathered, own_share, process_group, rank
    from stable_sam_cuda.evaluation.protocol import check_protocol
    from stable_sam_cuda.evaluation.protocol import evaluate as run_protocol
    from stable_sam_cuda.evaluation.report import paper_table, precision_table, results_csv, results_document
    from stable_sam_cuda.sam import StableSamPredictor, load_sam
    from stable_sam_cuda.training.methods import load_method

    kinds = [kind.strip() for kind in prompts.split(",")]
    check_protocol(kinds, draws)
    settings: dict[str, Any] = {
        "model": model,
        "checkpoint": printable(checkpoint) if checkpoint else None,
        "plugin": printable(plugin),
        "split": split,
        "draws": draws,
        "every": every,
        "limit": limit,
        "seed": seed,
        "layout": layout,
        "masks": masks,
        "crowds": crowds,
    }
    with process_group(), ExitStack() as stack:
        first = rank() == 0
        where = pick_device(own_device(device))
        if first:
            outputs = stack.enter_context(Outputs(out, overwrite=overwrite, keep=[data]))
        samples = choose_samples(data, split, (), limit, seed, layout, masks=masks, crowds=crowds)[::every]
        if first:
            # By content: another training, or other pictures, may have come to lie under the same names.
            weights = [file_digest(path) for path in (checkpoint, Path(plugin)) if path and path.is_file()]
            of_this = {"data": printable(data.absolute()), "prompts": kinds, "average_precision": average_precision}
            of_this |= {"weights_sha256": weights, "data_sha256": content_digest(samples)}
            report = outputs.claim("results", [".csv"], {"verb": "evaluate", **settings, **of_this}, ROOM, "settings")
        if average_precision:
            from stable_sam_cuda.evaluation.coco import check_precision, precision_by_kind

            check_precision(samples, kinds)
        sam = load_sam(model, checkpoint=checkpoint, device=where)
        if plugin != NO_PLUGIN:
            load_method(sam, plugin)
        samples = usable_samples(samples, quiet=not first)
        predictor = StableSamPredictor(sam)
        share = own_share(samples)
        by_picture = []
        with progress_shown(quiet=not first) as progress:
            progress.begin("evaluating", len(share))
            for sample in share:
                by_picture.append(run_protocol(predictor, [sample], kinds, draws=draws, seed=seed))
                progress.advance()
        results = gathered(by_picture)
        if not first:
            return

        def publish(more: dict[str, Any]) -> None:
            report.text("results.csv", results_csv(results))
            report.publish(results_document(results, {**settings, "pictures": len(samples), **more}), indent=1)

        # At once, so that what comes now cannot lose it.
        publish({})
        tell(table_lines(paper_table(results, f"{model}, plugin {plugin}, {draws} draws")))
        if average_precision:
            with progress_shown() as progress:
                progress.begin("average precision", len(samples) * len(kinds))
                precisions = precision_by_kind(
                    predictor, samples, kinds, seed=seed, progress=lambda image: progress.advance()
                )
            publish({"average_precision": precisions})
            tell(table_lines(precision_table(precisions)))
        tell(f"results: {printable(out / 'results.json')}")
