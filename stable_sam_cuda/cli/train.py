"""``stable-sam train``: a plugin, or one of the paper's baselines, on pictures with masks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stable_sam_cuda.cli.errors import explain_user_errors
from stable_sam_cuda.cli.progress import progress_bars


@explain_user_errors
def train(
    data: Annotated[Path, typer.Option(help="Pictures with masks: folders, or a tree of them, or a COCO file.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and plugin.")],
    model: Annotated[str, typer.Option(help="sam_lite, vit_b, vit_l or vit_h.")] = "sam_lite",
    checkpoint: Annotated[Path | None, typer.Option(help="A local checkpoint of the model.")] = None,
    method: Annotated[str, typer.Option(help="stable, pt, dt, lora or adapter.")] = "stable",
    split: Annotated[str | None, typer.Option(help="A split named in the data's splits.json.")] = None,
    layout: Annotated[str, typer.Option(help="How DATA is laid out: auto, folders, mixed or coco.")] = "auto",
    exclude: Annotated[str, typer.Option(help="Sets to leave out, by commas.")] = "",
    limit: Annotated[int | None, typer.Option(help="So many pictures only, drawn with the seed.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the image embeddings; default OUT/embeddings.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    images: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 4,
    objects: Annotated[int, typer.Option(help="Objects of a picture, at most.", min=1)] = 3,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    max_offset: Annotated[float, typer.Option(help="s_p of the plugin, in pixels of the feature map.")] = 4.0,
    amplitude: Annotated[str, typer.Option(help="Reading of the amplitude: conv, location or channel.")] = "conv",
    router_hidden: Annotated[int, typer.Option(help="Width of the router; 0: no router.")] = 32,
    robust: Annotated[bool, typer.Option(help="RTS: all prompt kinds; without it, exact boxes only.")] = True,
    occlusions: Annotated[int, typer.Option(help="So many pictures with a partly hidden object on top.", min=0)] = 0,
    occluded_masks: Annotated[
        str, typer.Option(help="Of hidden objects: visible (the part seen) or whole.")
    ] = "visible",
    resume: Annotated[bool, typer.Option(help="Continue the run in OUT.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train with SAM frozen, from cached image embeddings; writes OUT/plugin.safetensors (method stable)."""
    from stable_sam_cuda.cli.samples import usable_samples
    from stable_sam_cuda.sam import load_sam
    from stable_sam_cuda.training.dataset import choose_samples
    from stable_sam_cuda.training.method_file import method_file_name
    from stable_sam_cuda.training.run import TrainingRun, check_run, train_method

    console = Console()
    run = TrainingRun(
        method, epochs, images, objects, lr, max_offset, amplitude, router_hidden, robust, occlusions,
        occluded_masks, seed,
    )  # fmt: skip
    check_run(run, out, resume)
    excluded = [name for name in exclude.split(",") if name]
    samples = usable_samples(choose_samples(data, split, excluded, limit, seed, layout), console)
    sam = load_sam(model, checkpoint=checkpoint, device=device)
    with progress_bars(console) as progress:
        train_method(
            samples, sam, run, out, cache=cache, resume=resume, progress=progress,
            provenance={"split": split, "exclude": exclude},
        )  # fmt: skip
    what = "plugin" if method == "stable" else "weights"
    console.print(f"{what}: {out / method_file_name(method)}")
