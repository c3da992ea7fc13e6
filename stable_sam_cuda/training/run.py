"""One training run from pictures to weights: embeddings, occlusions, method, steps, file."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import distributed, nn

from stable_sam_cuda.data.augmentation import augmented_images
from stable_sam_cuda.data.digests import Digests
from stable_sam_cuda.data.embeddings import EmbeddingCache
from stable_sam_cuda.data.occlusion import OccludedImage, occluded_images
from stable_sam_cuda.data.prompts import GOOD_BOX_ONLY, ROBUST, PromptMix
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.files import require_folder
from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.modules.validation import require_integer
from stable_sam_cuda.notes import printable
from stable_sam_cuda.progress import NoProgress, RunProgress
from stable_sam_cuda.training.loop import PluginTrainer, StepRecord
from stable_sam_cuda.training.methods import (
    ENCODER_METHODS,
    check_method,
    install_method,
    method_file_name,
    save_method,
)
from stable_sam_cuda.training.options import TrainingOptions
from stable_sam_cuda.training.pictures import CachedPictures, EncodedPictures, PictureSource
from stable_sam_cuda.training.record import CHECKPOINT, LOG, Curves, RunLog, summary_writer

SHOWN_OCCLUSIONS = 18
OCCLUSIONS = "occlusions.png"
OCCLUDED_MASKS = ("visible", "whole")
RECORDED_WHERE_SET = ("mix", "accumulate", "together", "amp", "loss", "time_budget", "augment", "blocks")


@dataclass(frozen=True)
class TrainingRun:
    """What a run trains and how: the options of ``stable-sam train``, under their names there."""

    method: str = "stable"
    epochs: int = 1
    images: int = 4
    objects: int = 3
    lr: float = 5e-4
    max_offset: float = 4.0
    amplitude: str = "conv"
    router_hidden: int = 32
    robust: bool = True
    mix: str = ""  # of RTS, as `PromptMix.parsed` reads it; empty: the default one
    occlusions: int = 0
    occluded_masks: str = "visible"
    augment: int = 0
    accumulate: int = 1
    together: int = 1
    amp: str = "off"
    loss: str = "mask"
    time_budget: float | None = None
    checkpoint_every: int = 50
    seed: int = 0
    blocks: int = 1

    def options(self) -> TrainingOptions:
        """Those of the training loop."""
        return TrainingOptions(
            self.epochs, self.images, self.objects, self.lr, mix=self.prompt_mix(),
            seed=self.seed, checkpoint_every=self.checkpoint_every, accumulate=self.accumulate,
            together=self.together, amp=self.amp, loss=self.loss, time_budget=self.time_budget,
        )  # fmt: skip

    def prompt_mix(self) -> PromptMix:
        """Frequencies of the prompt kinds.

        Raises:
            ValueError: ``mix`` cannot be read, or is given without ``robust``.
        """
        if not self.mix:
            return ROBUST if self.robust else GOOD_BOX_ONLY
        if not self.robust:
            raise ValueError(f"mix: expected none with no-robust, which trains on exact boxes only, got {self.mix!r}")
        return PromptMix.parsed(self.mix)

    def new_options(self) -> dict[str, Any]:
        """Options that the record names only where they are not at their default."""
        defaults = {one.name: one.default for one in fields(self)}
        values = {name: getattr(self, name) for name in RECORDED_WHERE_SET}
        return {name: value for name, value in values.items() if value != defaults[name]}


def check_run(
    run: TrainingRun,
    out: Path,
    resume: bool,
    device: torch.device,
    *,
    overwrite: bool = False,
    cache: Path | None = None,
    tensorboard: bool = False,
) -> None:
    """Tell what is wrong before pictures are read and a model is loaded.

    Args:
        overwrite: a run and its results in ``out`` may be replaced.
        cache: as in `train_method`. A folder that is there may be read-only: it may hold all that is needed.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is False, or results that would be replaced; it or ``cache``
            cannot be made or written; an option is out of range.
        ModuleNotFoundError: ``tensorboard`` is asked for and not installed.
    """
    if tensorboard:
        summary_writer()
    if resume and overwrite:
        raise ValueError("overwrite: expected none with resume, which goes on with what is there")
    _check_results(run, out, resume, overwrite)
    if run.occluded_masks not in OCCLUDED_MASKS:
        raise ValueError(f"occluded-masks: expected visible or whole, got {run.occluded_masks!r}")
    for name in ("occlusions", "augment"):
        if getattr(run, name) < 0:
            raise ValueError(f"{name}: expected at least 0, got {getattr(run, name)}")
    check_method(run.method)
    require_integer("blocks", run.blocks, 1)
    run.options().check(device)
    require_folder("out", out)
    if cache is not None and run.method not in ENCODER_METHODS and not cache.is_dir():
        require_folder("cache", cache, make=False)


def _check_results(run: TrainingRun, out: Path, resume: bool, overwrite: bool) -> None:
    """See that nothing is replaced that nobody said may be."""
    if overwrite:
        return
    if os.path.lexists(out / CHECKPOINT):
        if not resume:
            raise ValueError(
                f"out: expected an empty folder, got {printable(out)}, which holds a run (--resume continues it, "
                "--overwrite replaces it)"
            )
        return
    # A run that was killed before its first checkpoint leaves its log; to resume it is to begin it.
    names = [method_file_name(run.method), *([] if resume else [LOG, OCCLUSIONS])]
    if taken := [name for name in names if os.path.lexists(out / name)]:
        raise ValueError(
            f"out: expected a folder without results, got {printable(out)}, which holds {', '.join(taken)} and no "
            f"{CHECKPOINT} (--overwrite replaces them)"
        )


def _remove_results(run: TrainingRun, out: Path) -> None:
    """Take away what belongs to the run that is replaced: it would be taken for the new one's."""
    for name in (CHECKPOINT, method_file_name(run.method), LOG):
        (out / name).unlink(missing_ok=True)


def _check_space(parameters: Mapping[str, nn.Parameter], out: Path) -> None:
    """A checkpoint holds parameters and two moments of each, and the next one is written beside it.

    Raises:
        OSError: the disk is too small.
    """
    needed = 6 * sum(parameter.nbytes for parameter in parameters.values())
    free = shutil.disk_usage(out).free
    if needed > free:
        reason = f"checkpoints take {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free"
        raise OSError(errno.ENOSPC, f"No space left on device; {reason}", printable(out))


def train_method(
    samples: Sequence[Sample],
    sam: Sam,
    run: TrainingRun,
    out: Path,
    *,
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Train ``run.method`` on ``samples``, in ``sam`` itself; returns the training record.

    ``out`` receives checkpoint.pt, log.jsonl, occlusions.png and at the end `method_file_name`, with the record.
    Where ``torch.distributed`` is initialised, all its processes call this alike; the first one writes.

    Args:
        sam: a plain SAM; afterwards it holds the trained method.
        cache: folder of the image embeddings; default ``out / "embeddings"``. Not used by FT-SAM.
        resume: continue the run in ``out``, if there is one.
        overwrite: replace the run and the results in ``out``, when the training itself begins.
        tensorboard: also write curves to ``out / "tensorboard"``.
        provenance: what the record is to say of the samples.

    Raises:
        ValueError: as `check_run`, `install_method`, `occluded_images`, `EmbeddingCache`, `PluginTrainer.resume`
            and `PluginTrainer.run`.
        OSError: a picture cannot be read, or ``out`` or ``cache`` cannot be written.
        ModuleNotFoundError: ``tensorboard`` is not installed.
        Interrupted, Terminated: SIGINT or SIGTERM came while it trained; ``step`` is that of the checkpoint.
    """
    check_run(run, out, resume, sam.device, overwrite=overwrite, cache=cache, tensorboard=tensorboard)
    if distributed.is_initialized():
        distributed.barrier()  # what the first process writes from here on would look like another run's results
    progress = progress or NoProgress()
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    parameters = _install(sam, run)
    _check_space(parameters, out)
    source = _source(list(samples), sam, run, cache or out / "embeddings", out, first, progress)
    trainer = PluginTrainer(sam, parameters, source, out, run.options())
    if resume:
        trainer.resume()
    if overwrite and first:
        _remove_results(run, out)
    log = RunLog(out, trainer.step) if first else None
    curves = Curves(out, trainer.step) if tensorboard and first else None
    seconds = None if run.time_budget is None else round(60 * run.time_budget)
    done = trainer.step if seconds is None else round(60 * trainer.minutes)
    progress.begin(f"training {run.method}{' (seconds)' if seconds else ''}", seconds or trainer.steps, done)

    def note(record: StepRecord) -> None:
        nonlocal done
        now = trainer.step if seconds is None else min(seconds, round(60 * trainer.minutes))
        progress.advance(now - done)
        done = now
        if log:
            log.add(record)
            if log.loss is not None and log.iou is not None:
                progress.note(f"loss {log.loss:.3f}  IoU {log.iou:.3f}")
        if curves:
            curves.add(record)

    try:
        trainer.run(note, progress.note)
    finally:
        if log:
            log.close()
        if curves:
            curves.close()
    record = {
        "method": run.method, "pictures": len(samples), **(provenance or {}),
        "epochs": run.epochs if seconds is None else round(trainer.step / trainer.steps_an_epoch, 2),
        "images": run.images, "objects": run.objects, "lr": run.lr, "robust": run.robust,
        "occlusions": run.occlusions, "occluded_masks": run.occluded_masks, **run.new_options(), "seed": run.seed,
        "steps": trainer.step, "final_loss": round(log.loss, 4) if log and log.loss is not None else None,
        "minutes": round(trainer.minutes, 2),
    }  # fmt: skip
    if first:
        save_method(sam, run.method, parameters, out / method_file_name(run.method), **record)
    return record


def _source(
    samples: list[Sample], sam: Sam, run: TrainingRun, cache: Path, out: Path, first: bool, progress: RunProgress
) -> PictureSource:
    """The samples with what is made of them, encoded once, or in each step where the encoder learns."""
    every: list[Sample] = [*samples]
    if run.augment:
        every += augmented_images(samples, run.augment, sam.image_encoder.img_size, run.seed)
    if run.occlusions:
        progress.begin("occlusions", run.occlusions)
        whole = run.occluded_masks == "whole"
        hidden = occluded_images(samples, run.occlusions, run.seed, whole=whole, progress=progress.advance)
        if first:
            _show(hidden[:SHOWN_OCCLUSIONS], out)
        every += hidden
    digests = Digests()
    if run.method in ENCODER_METHODS:
        return EncodedPictures(sam, every, digests)
    embeddings = EmbeddingCache(cache, sam, every, digests)
    progress.begin("embeddings", len(every), int(embeddings.done.sum()))
    embeddings.fill(progress.advance)
    return CachedPictures(sam, embeddings)


def _install(sam: Sam, run: TrainingRun) -> dict[str, nn.Parameter]:
    """The method with initial weights that the seed alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        if run.method != "stable":
            return install_method(sam, run.method)
        width = sam.mask_decoder.transformer_dim
        sizes: dict[str, Any] = {"token_channels": width, "router_hidden": run.router_hidden}
        sizes |= {"max_offset": run.max_offset, "amplitude": run.amplitude, "blocks": run.blocks}
        return install_method(sam, run.method, DeformableSampler(width, **sizes))


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
    contact_sheet(tiles, columns=6).save(out / OCCLUSIONS)
