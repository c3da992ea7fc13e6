"""The steps of a run: a cosine over a time budget, averaged weights, checkpoints.

Several processes (``torchrun``) train by themselves and average their weights now and then.
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import distributed
from torch.nn import Parameter

from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.digests import Digests, seed_of
from stable_sam_cuda.data.samples import Sample, digest_of_file
from stable_sam_cuda.data.sharding import rank
from stable_sam_cuda.files import require_folder, save_bytes
from stable_sam_cuda.notes import printable
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.training.interruption import Interruption
from stable_sam_cuda.training.record import (
    CHECKPOINT,
    LOG,
    Curves,
    check_contents,
    drop_newer,
    json_line,
    read_state,
    remove_partial,
    sample_contents,
    summary_writer,
    whole_checkpoint,
    write_state,
)
from stable_sam_cuda.training.sam_lite.batches import Batch, BatchStream, Drawing, batches_of
from stable_sam_cuda.training.sam_lite.loss import training_step, validate
from stable_sam_cuda.training.sam_lite.options import Settings
from stable_sam_cuda.training.sam_lite.weights import save_weights, starting_model
from stable_sam_cuda.training.step import cosine

WEIGHTS = "sam_lite.safetensors"
RUN_RECORD = "run.json"
STEPS_APART = 16  # steps that processes take by themselves before their weights are averaged
REPORT_EVERY = 20  # steps
BACKBONE_RATE = 0.3  # of the learning rate
SMOOTHING = 0.98

Report = Callable[[dict[str, Any]], None]


class LiteTrainer:
    """One run; ``minutes`` counts what was used before it was continued, too."""

    def __init__(self, sam: Sam, samples: list[Sample], validation: list[Sample], settings: Settings) -> None:
        self.sam, self.samples, self.validation, self.settings = sam, samples, validation, settings
        recipe = settings.recipe
        self.average = torch.optim.swa_utils.AveragedModel(
            sam, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
        )
        backbone = list(sam.image_encoder.backbone.parameters())
        known = {id(p) for p in backbone}
        others = [p for p in sam.parameters() if id(p) not in known]
        groups = [{"params": backbone, "scale": BACKBONE_RATE}, {"params": others, "scale": 1.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=0.01)
        self.step, self.minutes = 0, 0.0
        self.digests = Digests()
        self._samples: dict[str, Any] | None = None
        self.init = digest_of_file(settings.init) if settings.init else None  # of the weights that the run began with
        self.loss: float | None = None  # running means, None before the first step
        self.overlap: float | None = None

    def run(self, report: Report) -> bool:
        """Train until the budget is used up, or this call's time is; whether the run is finished.

        Raises:
            ValueError: the loss is no longer finite; the last checkpoint stays.
            OSError: a picture cannot be read, or a file cannot be written; the last checkpoint stays.
            Interrupted, Terminated: SIGINT or SIGTERM came; ``step`` is that of the checkpoint.
        """
        if rank() == 0:
            self._sample_contents()
        settings, recipe = self.settings, self.settings.recipe
        seed = self._seed()
        drawing = Drawing(recipe.image_size, recipe.batch, recipe.objects, recipe.copy_paste)
        stream = BatchStream(self.samples, drawing, seed)
        generator = torch.Generator().manual_seed(seed)
        first_step, before, start = self.step, self.minutes, time.monotonic()
        saved, next_validation = self.minutes, self._next_validation()
        pinned, leaving = self.sam.device.type == "cuda", False
        with Interruption() as interruption, batches_of(stream, settings.workers, pinned) as batches:
            for batch in batches:
                self.minutes = shared_minutes(before + (time.monotonic() - start) / 60, self.step)
                if self.step > first_step and at_meeting(self.step):
                    if rank() == 0 and self.minutes - saved >= settings.checkpoint_minutes:
                        self.save()
                        saved = self.minutes
                    leaving = interruption.wanted()
                    if leaving:
                        break
                    if settings.pause_after is not None and self.minutes - before >= settings.pause_after:
                        break
                if self.finished:
                    break
                rate = self._train_step(batch, generator)
                if rank() != 0:
                    continue
                now = {"step": self.step, "minutes": round(self.minutes, 2)}
                if self.step % REPORT_EVERY == 0:
                    report({**now, "lr": rate, "loss": self.loss, "iou": self.overlap})
                if self.minutes > next_validation:
                    next_validation += settings.validate_minutes
                    self.save_weights()
                    values = validate(self.average.module, self.validation[::2], recipe.image_size)
                    report({**now, "val": values})
        self.minutes = before + (time.monotonic() - start) / 60
        if rank() == 0:
            self.save()
            self.save_weights()
        if leaving:
            interruption.leave(self.step)
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether steps or minutes are used up; of the minutes, processes only speak where they meet."""
        late = self.minutes >= self.settings.minutes and at_meeting(self.step)
        return late or (self.settings.steps is not None and self.step >= self.settings.steps)

    def _train_step(self, batch: Batch, generator: torch.Generator) -> float:
        """One step; its learning rate."""
        recipe = self.settings.recipe
        rate = recipe.lr * min(1, (self.step + 1) / recipe.warmup) * cosine(self.minutes / self.settings.minutes)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss, overlap = training_step(self.sam, batch.to(self.sam.device), generator, self.settings.half)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"lr: expected a run that stays finite, got a loss of {loss.item()} in step {self.step + 1} with lr "
                f"{recipe.lr}; the last checkpoint is kept"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sam.parameters(), 1.0)
        self.optimizer.step()
        if distributed.is_initialized() and self.step % STEPS_APART == STEPS_APART - 1:
            average_weights(self.sam.parameters())
        self.average.update_parameters(self.sam)
        self.step += 1
        self.loss = _running(self.loss, loss.item())
        self.overlap = _running(self.overlap, overlap.item())
        return rate

    def _seed(self) -> int:
        """Of pictures and prompts from here on: a run that is continued does not see the first ones again."""
        parts = (self.settings.recipe.seed, rank())
        return seed_of("sam_lite", *parts) if self.step == 0 else seed_of("sam_lite", *parts, "from", self.step)

    def _next_validation(self) -> float:
        return self.settings.validate_minutes * (1 + self.minutes // self.settings.validate_minutes)

    def save(self) -> None:
        """Weights, their average, optimiser, step and minutes in OUT/checkpoint.pt."""
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "model": self.sam.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "samples": self._sample_contents(),
            "init": self.init,
            "running": {"loss": self.loss, "overlap": self.overlap},
        }
        write_state(self.settings.out, self.settings.recipe, state)

    def resume(self) -> None:
        """Continue from the checkpoint in OUT, if there is one; each process of several from process 0's.

        Raises:
            ValueError: the checkpoint is damaged, or of a run with another recipe, with pictures or objects of
                another content, or, where ``init`` is given, of a run that began with other weights.
            OSError: the checkpoint or a picture cannot be read.
        """
        if not (self.settings.out / CHECKPOINT).is_file():
            return
        state = read_state(self.settings.out, self.settings.recipe)
        check_contents(self.settings.out, state, self.samples, self.digests)
        if self.init is not None and "init" in state and state["init"] != self.init:
            raise ValueError(
                f"init: expected the weights that the run in {printable(self.settings.out)} began with, or none, got "
                f"{printable(self.settings.init or '')}"
            )
        with whole_checkpoint(self.settings.out):
            self.sam.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.minutes = int(state["step"]), float(state["minutes"])
            self.loss, self.overlap = state["running"]["loss"], state["running"]["overlap"]
        self.init = state.get("init", self.init)

    def _sample_contents(self) -> dict[str, Any]:
        """What the pictures and their objects were when the run began or went on."""
        if self._samples is None:
            self._samples = sample_contents(self.samples, self.digests)
        return self._samples

    def save_weights(self) -> None:
        """The averaged weights in OUT/sam_lite.safetensors."""
        save_weights(self.average.module, self.settings.out / WEIGHTS, variant=self.settings.recipe.variant)


def _running(mean: float | None, value: float) -> float:
    return value if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * value


@torch.no_grad()
def average_weights(parameters: Iterable[Parameter]) -> None:
    """Every process's weights become the mean over processes (local SGD)."""
    parameters = list(parameters)
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    distributed.all_reduce(flat)
    parts = (flat / distributed.get_world_size()).split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def at_meeting(step: int) -> bool:
    """Whether the processes agree before this step: on the weights, and on whether to go on. Always, where one is
    alone."""
    return not distributed.is_initialized() or step % STEPS_APART == 0


def shared_minutes(minutes: float, step: int) -> float:
    """The minutes of process 0 where processes meet, so that all stop at the same step and none waits in between."""
    shared = torch.tensor(minutes, dtype=torch.float64)
    if distributed.is_initialized() and at_meeting(step):
        distributed.broadcast(shared, 0)
    return shared.item()


def train(settings: Settings, device: torch.device) -> None:
    """Begin or continue the run in ``settings.out``; log.jsonl, weights, checkpoint, and run.json when it is finished.

    Raises:
        ValueError: an option is out of range; the folder holds a run and ``resume`` is False; the data has no splits
            ``train`` and ``val``, or less pictures than a step takes; as `LiteTrainer.resume` and `LiteTrainer.run`.
        ImportError: the package with the ImageNet weights, or TensorBoard, is not installed.
    """
    settings.check()
    recipe, out = settings.recipe, settings.out
    if settings.tensorboard:
        summary_writer()
    _check_results(settings)
    require_folder("out", out)
    if distributed.is_initialized():
        distributed.barrier()  # what the first process writes from here on would look like another run's results
    torch.manual_seed(recipe.seed)
    samples, validation = (find_masked_images(settings.data, split) for split in ("train", "val"))
    if len(samples) < recipe.batch:
        raise ValueError(f"batch: expected at most the {len(samples)} pictures of the data, got {recipe.batch}")
    if settings.resume and (out / CHECKPOINT).exists():  # which holds all weights: none are asked for on this machine
        sam = new_sam_lite(recipe.variant, recipe.image_size)
    else:
        sam = starting_model(recipe.variant, recipe.image_size, settings.init)
    trainer = LiteTrainer(sam.to(device), samples, validation, settings)
    if settings.resume:
        trainer.resume()
    if rank() != 0:
        trainer.run(lambda record: None)
        return
    remove_partial(out)
    (out / RUN_RECORD).unlink(missing_ok=True)  # of a run that now goes on for longer
    if settings.overwrite:
        for name in (CHECKPOINT, WEIGHTS, LOG):
            (out / name).unlink(missing_ok=True)
    drop_newer(out / LOG, trainer.step)
    curves = Curves(out, trainer.step) if settings.tensorboard else None
    with (out / LOG).open("a", encoding="utf-8") as log:

        def report(record: dict[str, Any]) -> None:
            line = json_line(record)
            print(line, file=log, flush=True)
            print(line, flush=True)
            if curves:
                curves.add(record)

        finished = trainer.run(report)
        values = validate(trainer.average.module, validation, recipe.image_size) if finished else None
        record = {"step": trainer.step, "minutes": trainer.minutes, "val": values}
        if finished:
            processes = distributed.get_world_size() if distributed.is_initialized() else 1
            asked = {key: value for key, value in vars(settings).items() if key != "recipe"} | asdict(recipe)
            run = {**asked, "processes": processes, **record}
            save_bytes(out / RUN_RECORD, json_line(run, default=str, indent=2).encode())
        report(record if finished else {"step": trainer.step, "minutes": trainer.minutes, "paused": True})
    if curves:
        curves.close()


def _check_results(settings: Settings) -> None:
    """See that nothing is replaced that nobody said may be."""
    out = settings.out
    if settings.overwrite:
        return
    if os.path.lexists(out / CHECKPOINT):
        if not settings.resume:
            raise ValueError(
                f"out: expected a folder without a run, got {printable(out)}, which holds one (--resume continues it, "
                "--overwrite replaces it)"
            )
        return
    names = [WEIGHTS, RUN_RECORD, *([] if settings.resume else [LOG])]
    if taken := [name for name in names if os.path.lexists(out / name)]:
        raise ValueError(
            f"out: expected a folder without results, got {printable(out)}, which holds {', '.join(taken)} and no "
            f"{CHECKPOINT} (--overwrite replaces them)"
        )
