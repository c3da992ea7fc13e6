"""``stable-sam train``: a plugin, or one of the paper's baselines, on pictures with masks."""

from pathlib import Path
from typing import Annotated

import typer

from stable_sam_cuda.cli.console import say_note, tell
from stable_sam_cuda.cli.errors import explain_user_errors
from stable_sam_cuda.cli.models import check_model
from stable_sam_cuda.cli.samples import check_data, usable_samples
from stable_sam_cuda.notes import printable
from stable_sam_cuda.progress import progress_shown


@explain_user_errors
def train(
    data: Annotated[Path, typer.Option(help="Pictures with masks: folders, or a tree of them, or a COCO file.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and plugin.")],
    model: Annotated[str, typer.Option(help="sam_lite, vit_b, vit_l or vit_h.")] = "sam_lite",
    checkpoint: Annotated[Path | None, typer.Option(help="A local checkpoint of the model.")] = None,
    method: Annotated[str, typer.Option(help="stable, pt, dt, ft, lora or adapter.")] = "stable",
    split: Annotated[str | None, typer.Option(help="A split named in the data's splits.json.")] = None,
    layout: Annotated[str, typer.Option(help="How DATA is laid out: auto, folders, mixed or coco.")] = "auto",
    masks: Annotated[
        str, typer.Option(help="What a mask file's values mean: auto (decided by set), binary, instances or void.")
    ] = "auto",
    crowds: Annotated[str, typer.Option(help="COCO annotations with iscrowd 1: skip, or use as objects.")] = "skip",
    exclude: Annotated[str, typer.Option(help="Sets to leave out, by commas.")] = "",
    limit: Annotated[int | None, typer.Option(help="So many pictures only, drawn with the seed.", min=1)] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the image embeddings; default OUT/embeddings.")] = None,
    epochs: Annotated[int, typer.Option(help="Times that each picture is seen.", min=1)] = 1,
    time_budget: Annotated[
        float | None, typer.Option(help="Minutes to train for, instead of so many epochs.", min=0)
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 4,
    accumulate: Annotated[int, typer.Option(help="So many times --images pictures a step.", min=1)] = 1,
    together: Annotated[int, typer.Option(help="Pictures at once: faster on a GPU, in more memory.", min=1)] = 1,
    objects: Annotated[int, typer.Option(help="Objects of a picture, at most.", min=1)] = 3,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 5e-4,
    loss: Annotated[str, typer.Option(help="Of the whole mask, or HQ-SAM's at points: mask or points.")] = "mask",
    max_offset: Annotated[float, typer.Option(help="s_p of the plugin, in pixels of the feature map.")] = 4.0,
    amplitude: Annotated[str, typer.Option(help="Reading of the amplitude: conv, location or channel.")] = "conv",
    router_hidden: Annotated[int, typer.Option(help="Width of the router; 0: no router.")] = 32,
    blocks: Annotated[
        int,
        typer.Option(
            help="How many of the decoder's last blocks share the plugin: 1, the paper's, or 2.", min=1, max=2
        ),
    ] = 1,
    robust: Annotated[bool, typer.Option(help="RTS: all prompt kinds; without it, exact boxes only.")] = True,
    mix: Annotated[
        str, typer.Option(help="Frequencies of RTS's prompt kinds: noisy_box=3,one_point=2,...; empty: the default.")
    ] = "",
    occlusions: Annotated[int, typer.Option(help="So many pictures with a partly hidden object on top.", min=0)] = 0,
    occluded_masks: Annotated[
        str, typer.Option(help="Of hidden objects: visible (the part seen) or whole.")
    ] = "visible",
    augment: Annotated[int, typer.Option(help="So many flipped and rescaled variants a picture on top.", min=0)] = 0,
    amp: Annotated[str, typer.Option(help="Mixed precision: off, bf16, or on a GPU fp16.")] = "off",
    checkpoint_every: Annotated[int, typer.Option(help="Steps from one checkpoint to the next.", min=1)] = 50,
    tensorboard: Annotated[bool, typer.Option(help="Curves in OUT/tensorboard.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue the run in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run and the results in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train on prompts of every kind; under ``torchrun`` by all its processes. Writes OUT/plugin.safetensors."""
    check_data(data, split)
    check_model(model, checkpoint)
    import torch

    from stable_sam_cuda.data.dataset import choose_samples
    from stable_sam_cuda.data.sharding import process_group, rank
    from stable_sam_cuda.devices import own_device, pick_device
    from stable_sam_cuda.sam import load_sam
    from stable_sam_cuda.training.interruption import Interrupted, Terminated
    from stable_sam_cuda.training.methods import method_file_name
    from stable_sam_cuda.training.run import TrainingRun, check_run, train_method

    run = TrainingRun(
        method, epochs, images, objects, lr, max_offset, amplitude, router_hidden, robust, mix, occlusions,
        occluded_masks, augment, accumulate, together, amp, loss, time_budget, checkpoint_every, seed, blocks,
    )  # fmt: skip
    with process_group():
        first = rank() == 0
        own = pick_device(own_device(device))
        if own.index is not None:
            torch.cuda.set_device(own)
        check_run(run, out, resume, own, overwrite=overwrite, cache=cache, tensorboard=tensorboard)
        excluded = [name for name in exclude.split(",") if name]
        samples = choose_samples(data, split, excluded, limit, seed, layout, masks=masks, crowds=crowds)
        sam = load_sam(model, checkpoint=checkpoint, device=own)
        samples = usable_samples(samples, quiet=not first)
        try:
            with progress_shown(quiet=not first) as progress:
                train_method(
                    samples, sam, run, out, cache=cache, resume=resume, overwrite=overwrite, tensorboard=tensorboard,
                    progress=progress,
                    provenance={"split": split, "exclude": exclude, "masks": masks, "crowds": crowds},
                )  # fmt: skip
        except (Interrupted, Terminated) as ended:
            if first:
                say_note(f"interrupted; {printable(out)} has a checkpoint at step {ended.step}; --resume continues")
            raise
        if first:
            what = "plugin" if method == "stable" else "weights"
            tell(f"{what}: {printable(out / method_file_name(method))}")
