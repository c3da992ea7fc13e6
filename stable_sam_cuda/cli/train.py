"""``stable-sam train``: a plugin, or one of the paper's baselines, on pictures with masks."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stable_sam_cuda.cli.errors import explain_user_errors

if TYPE_CHECKING:
    from stable_sam_cuda.training.occluded_images import OccludedImage

SHOWN_OCCLUSIONS = 18


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
    from stable_sam_cuda.modules import DeformableSampler
    from stable_sam_cuda.sam import load_sam, save_plugin
    from stable_sam_cuda.training.checkpoint import save_bytes
    from stable_sam_cuda.training.dataset import choose_samples
    from stable_sam_cuda.training.embeddings import EmbeddingCache, JoinedEmbeddings
    from stable_sam_cuda.training.loop import CHECKPOINT, PluginTrainer, TrainingOptions
    from stable_sam_cuda.training.methods import install_method
    from stable_sam_cuda.training.occluded_images import occluded_images
    from stable_sam_cuda.training.rts import GOOD_BOX_ONLY, ROBUST

    console = Console()
    if not resume and (out / CHECKPOINT).exists():
        raise ValueError(f"out: expected an empty folder, got {out}, which holds a run (--resume continues it)")
    if occluded_masks not in ("visible", "whole"):
        raise ValueError(f"occluded-masks: expected visible or whole, got {occluded_masks!r}")
    excluded = [name for name in exclude.split(",") if name]
    samples = usable_samples(choose_samples(data, split, excluded, limit, seed, layout), console)
    sam = load_sam(model, checkpoint=checkpoint, device=device)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        cache = cache or out / "embeddings"
        caches = [EmbeddingCache(cache, sam, samples)]
        if occlusions:
            task = progress.add_task("occlusions", total=occlusions, note="")
            hidden = occluded_images(
                samples, occlusions, seed, whole=occluded_masks == "whole", progress=lambda n: progress.advance(task, n)
            )
            _show(hidden[:SHOWN_OCCLUSIONS], out)
            caches.append(EmbeddingCache(cache / f"occlusions_{occlusions}_{seed}", sam, hidden))
        embeddings = JoinedEmbeddings(caches)
        done = sum(int(part.done.sum()) for part in caches)
        task = progress.add_task("embeddings", total=len(embeddings.samples), completed=done, note="")
        for part in caches:
            part.fill(lambda count: progress.advance(task, count))

        plugin = None
        if method == "stable":
            width = sam.mask_decoder.transformer_dim
            sizes = {"token_channels": width, "router_hidden": router_hidden}
            plugin = DeformableSampler(width, **sizes, max_offset=max_offset, amplitude=amplitude)
        parameters = install_method(sam, method, plugin)
        options = TrainingOptions(
            epochs, images, objects, lr, mix=ROBUST if robust else GOOD_BOX_ONLY, seed=seed
        )  # fmt: skip
        trainer = PluginTrainer(sam, parameters, embeddings, out, options)
        if resume:
            trainer.resume()
        task = progress.add_task(f"training {method}", total=trainer.steps, completed=trainer.step, note="")
        log = _Log(out)

        def note(record: dict[str, float]) -> None:
            log.add(record)
            progress.update(task, completed=record["step"], note=f"loss {log.loss:.3f}  IoU {log.iou:.3f}")

        started = time.perf_counter()
        trainer.run(note)
    record = {
        "method": method, "pictures": len(samples), "split": split, "exclude": exclude, "epochs": epochs,
        "images": images, "objects": objects, "lr": lr, "robust": robust, "occlusions": occlusions,
        "occluded_masks": occluded_masks, "seed": seed, "steps": trainer.steps,
        "final_loss": round(log.loss, 4), "minutes": round((time.perf_counter() - started) / 60, 2),
    }  # fmt: skip
    if method == "stable":
        save_plugin(sam, out / "plugin.safetensors", **record)
        console.print(f"plugin: {out / 'plugin.safetensors'}")
    else:
        from safetensors.torch import save

        content = save({name: parameter.detach().contiguous() for name, parameter in parameters.items()})
        save_bytes(out / f"{method}.safetensors", content)
        console.print(f"weights: {out / f'{method}.safetensors'}")


def _show(samples: "list[OccludedImage]", out: Path) -> None:
    """OUT/occlusions.png: the synthetic pictures, and on them what is visible and what is hidden of the target."""
    from stable_sam_cuda.visualize.contact_sheet import Tile, contact_sheet

    tiles = []
    for sample in samples:
        occlusion, mask = sample.occlusion()
        masks = (occlusion.visible, mask & ~occlusion.visible)
        tiles += [
            Tile(occlusion.image, caption=sample.base.name),
            Tile(occlusion.image, masks, f"{occlusion.hidden:.0%} hidden"),
        ]
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(tiles, columns=6).save(out / "occlusions.png")


class _Log:
    """Every step's record as a line of JSON in OUT/log.jsonl, and running means of loss and IoU."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "log.jsonl").open("a")
        self.loss = self.iou = float("nan")

    def add(self, record: dict[str, float]) -> None:
        import json

        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.loss = _running(self.loss, record["loss"])
        self.iou = _running(self.iou, record["iou"])


def _running(mean: float, value: float) -> float:
    if value != value:
        return mean
    return value if mean != mean else 0.95 * mean + 0.05 * value
