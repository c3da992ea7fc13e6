"""One training run from pictures to weights: embeddings, occlusions, method, steps, file."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from segment_anything.modeling import Sam
from torch import nn

from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.training.embeddings import EmbeddingCache, JoinedEmbeddings
from stable_sam_cuda.training.loop import CHECKPOINT, PluginTrainer, TrainingOptions
from stable_sam_cuda.training.method_file import method_file_name, save_method
from stable_sam_cuda.training.methods import install_method
from stable_sam_cuda.training.occluded_images import OccludedImage, occluded_images
from stable_sam_cuda.training.rts import GOOD_BOX_ONLY, ROBUST
from stable_sam_cuda.training.run_log import RunLog
from stable_sam_cuda.training.samples import Sample

SHOWN_OCCLUSIONS = 18
OCCLUDED_MASKS = ("visible", "whole")


@dataclass(frozen=True)
class TrainingRun:
    """What a run trains and how: the options of ``stable-sam train``, under their names there."""

    method: str = "stable"
    epochs: int = 1
    images: int = 4
    objects: int = 3
    lr: float = 1e-3
    max_offset: float = 4.0
    amplitude: str = "conv"
    router_hidden: int = 32
    robust: bool = True
    occlusions: int = 0
    occluded_masks: str = "visible"
    seed: int = 0


class RunProgress(Protocol):
    """Hears how a run proceeds, stage by stage."""

    def begin(self, stage: str, total: int, completed: int = 0) -> None:
        """A stage of ``total`` parts, of which ``completed`` are done."""

    def advance(self, count: int = 1) -> None:
        """So many parts of the stage are done."""

    def note(self, text: str) -> None:
        """How the stage fares."""


class Silence(RunProgress):
    """Keeps what it hears to itself."""


def check_run(run: TrainingRun, out: Path, resume: bool) -> None:
    """Tell what is wrong before pictures are read and a model is loaded.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is False; an option is unknown.
    """
    if not resume and (out / CHECKPOINT).exists():
        raise ValueError(f"out: expected an empty folder, got {out}, which holds a run (--resume continues it)")
    if run.occluded_masks not in OCCLUDED_MASKS:
        raise ValueError(f"occluded-masks: expected visible or whole, got {run.occluded_masks!r}")


def train_method(
    samples: Sequence[Sample],
    sam: Sam,
    run: TrainingRun,
    out: Path,
    *,
    cache: Path | None = None,
    resume: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Train ``run.method`` on ``samples``, in ``sam`` itself; returns the training record.

    ``out`` receives checkpoint.pt, log.jsonl, occlusions.png and at the end `method_file_name`, with the record.

    Args:
        sam: a plain SAM; afterwards it holds the trained method.
        cache: folder of the image embeddings; default ``out / "embeddings"``.
        resume: continue the run in ``out``, if there is one.
        provenance: what the record is to say of the samples.

    Raises:
        ValueError: as `check_run`, `install_method`, `occluded_images`, `EmbeddingCache` and `PluginTrainer.resume`.
        OSError: a picture cannot be read, or ``out`` or ``cache`` cannot be written.
    """
    check_run(run, out, resume)
    progress = progress or Silence()
    embeddings = _embeddings(list(samples), sam, run, cache or out / "embeddings", out, progress)
    parameters = _install(sam, run)
    options = TrainingOptions(
        run.epochs, run.images, run.objects, run.lr, mix=ROBUST if run.robust else GOOD_BOX_ONLY, seed=run.seed
    )
    trainer = PluginTrainer(sam, parameters, embeddings, out, options)
    if resume:
        trainer.resume()
    progress.begin(f"training {run.method}", trainer.steps, trainer.step)
    log = RunLog(out)

    def note(record: dict[str, float]) -> None:
        log.add(record)
        progress.advance()
        progress.note(f"loss {log.loss:.3f}  IoU {log.iou:.3f}")

    started = time.perf_counter()
    trainer.run(note)
    log.close()
    record = {
        "method": run.method, "pictures": len(samples), **(provenance or {}), "epochs": run.epochs,
        "images": run.images, "objects": run.objects, "lr": run.lr, "robust": run.robust,
        "occlusions": run.occlusions, "occluded_masks": run.occluded_masks, "seed": run.seed,
        "steps": trainer.steps, "final_loss": round(log.loss, 4),
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }  # fmt: skip
    save_method(sam, run.method, parameters, out / method_file_name(run.method), **record)
    return record


def _embeddings(
    samples: list[Sample], sam: Sam, run: TrainingRun, cache: Path, out: Path, progress: RunProgress
) -> JoinedEmbeddings:
    caches = [EmbeddingCache(cache, sam, samples)]
    if run.occlusions:
        progress.begin("occlusions", run.occlusions)
        whole = run.occluded_masks == "whole"
        hidden = occluded_images(samples, run.occlusions, run.seed, whole=whole, progress=progress.advance)
        _show(hidden[:SHOWN_OCCLUSIONS], out)
        caches.append(EmbeddingCache(cache / f"occlusions_{run.occlusions}_{run.seed}", sam, hidden))
    embeddings = JoinedEmbeddings(caches)
    progress.begin("embeddings", len(embeddings.samples), sum(int(part.done.sum()) for part in caches))
    for part in caches:
        part.fill(progress.advance)
    return embeddings


def _install(sam: Sam, run: TrainingRun) -> dict[str, nn.Parameter]:
    plugin = None
    if run.method == "stable":
        width = sam.mask_decoder.transformer_dim
        plugin = DeformableSampler(
            width,
            token_channels=width,
            router_hidden=run.router_hidden,
            max_offset=run.max_offset,
            amplitude=run.amplitude,
        )
    return install_method(sam, run.method, plugin)


def _show(samples: list[OccludedImage], out: Path) -> None:
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
