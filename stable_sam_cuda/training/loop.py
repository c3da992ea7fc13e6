"""The training loop: RTS prompts, cross-entropy and dice; resumable, on any number of processes.

Nothing random is carried from step to step: each step's pictures, objects and prompts follow from the seed and
the step's number, so a run that was killed continues bit for bit, and processes that share a step draw alike.
(With a time budget the learning rate follows the clock, and two runs are no longer the same.)
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import Sam
from torch import Tensor, distributed, nn

from stable_sam_cuda.data.digests import seed_of
from stable_sam_cuda.data.embeddings import fingerprint
from stable_sam_cuda.data.prompts import draw_kind, draw_prompts, joined_prompts
from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.notes import printable
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK
from stable_sam_cuda.training.interruption import Interruption
from stable_sam_cuda.training.losses import mask_overlap, point_sampled_loss, whole_mask_loss
from stable_sam_cuda.training.options import AMP_DTYPES, TrainingOptions
from stable_sam_cuda.training.pictures import Example, PictureSource, prefetched
from stable_sam_cuda.training.record import (
    CHECKPOINT,
    check_contents,
    read_state,
    remove_partial,
    sample_contents,
    whole_checkpoint,
    write_state,
)
from stable_sam_cuda.training.step import RouterProbe, alpha_by_kind, cosine, decode_prompts, sum_of

CHECKPOINT_MINUTES = 5.0
StepRecord = dict[str, Any]


class Drawn(NamedTuple):
    """A picture of a step: its place among those that are accumulated, and what was drawn for it."""

    place: int
    example: Example
    masks: Tensor
    generator: torch.Generator


class PluginTrainer:
    """One run of ``train``; ``parameters`` are those that `install_method` returned for ``sam``."""

    def __init__(
        self,
        sam: Sam,
        parameters: dict[str, nn.Parameter],
        source: PictureSource,
        out: Path,
        options: TrainingOptions,
    ) -> None:
        self.sam, self.parameters, self.source, self.out, self.options = sam, parameters, source, out, options
        options.check(sam.device)
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.pictures_a_step = options.images * options.accumulate
        if self.pictures_a_step % self.world:
            raise ValueError(
                f"images: expected a multiple of the {self.world} processes a step, got {self.pictures_a_step}"
            )
        self.steps_an_epoch = math.ceil(len(source.samples) / self.pictures_a_step)
        self.steps = self.steps_an_epoch * options.epochs
        self.step = self.updates = 0
        self.minutes = self.saved_minutes = 0.0
        self.optimizer = torch.optim.Adam(parameters.values(), lr=options.lr)
        self.scaler = torch.amp.GradScaler(sam.device.type, enabled=options.amp == "fp16")
        self.probe = RouterProbe(sam)
        self._base: str | None = None
        self._samples: dict[str, Any] | None = None

    def run(
        self,
        progress: Callable[[StepRecord], None] = lambda record: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Train to the end; ``progress`` hears of every step, ``note`` of an interruption.

        A record: step, loss, iou, seconds, lr, kinds (of each picture's prompts), and where there is a router
        alpha_1, the mean of each kind. A first SIGINT or SIGTERM lets the step end and writes a checkpoint; a second
        one leaves at once.

        Raises:
            ValueError: no object is large enough, or the loss is no longer finite; the last checkpoint stays.
            OSError: a picture cannot be read or a checkpoint cannot be written; the last checkpoint stays.
            Interrupted, Terminated: a signal came; ``step`` is that of the checkpoint.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            remove_partial(self.out)
            self._sample_contents()
            self._base_digest()
        self.sam.eval()
        clock = time.perf_counter()
        with Interruption() as interruption, self.probe, closing(prefetched(self._examples())) as examples:
            while not self.finished:
                started = time.perf_counter()
                record = self._train_step(examples)
                self.step += 1
                self._check_objects()
                now = time.perf_counter()
                self._use_minutes((now - clock) / 60)
                clock = now
                # Before it is saved: a log can drop what is newer than the checkpoint, but not know what it missed.
                progress({"step": self.step, **record, "seconds": now - started})
                leaving = interruption.wanted()
                if leaving:
                    note(f"interrupted: checkpoint at step {self.step}")
                if self.rank == 0 and (leaving or self._checkpoint_is_due()):
                    self.save_checkpoint()
                if leaving:
                    interruption.leave(self.step)

    @property
    def finished(self) -> bool:
        """Whether steps or minutes are used up."""
        budget = self.options.time_budget
        return self.step >= self.steps if budget is None else self.minutes >= budget

    def _rate(self) -> float:
        budget = self.options.time_budget
        return self.options.lr * cosine(self.updates / self.steps if budget is None else self.minutes / budget)

    def _use_minutes(self, minutes: float) -> None:
        """Add to the minutes used; all processes keep the first one's time, so that they stop together."""
        self.minutes += minutes
        if self.options.time_budget is not None and self.world > 1:
            shared = torch.tensor(self.minutes, dtype=torch.float64)
            distributed.broadcast(shared, 0)
            self.minutes = shared.item()

    def _checkpoint_is_due(self) -> bool:
        waited = self.minutes - self.saved_minutes >= CHECKPOINT_MINUTES
        return self.step % self.options.checkpoint_every == 0 or waited or self.finished

    def _check_objects(self) -> None:
        if self.updates == 0 and self.step >= self.steps_an_epoch:
            raise ValueError(
                f"data: expected objects that cover at least {self.options.minimum_area:.1%} of the frame, "
                f"got none in {len(self.source.samples)} pictures"
            )

    def _examples(self) -> Iterator[tuple[int, Example]]:
        """The pictures of this process, in the order of the steps from now on."""
        step = self.step
        while self.options.time_budget is not None or step < self.steps:
            for picture in self._pictures(step)[self.rank :: self.world]:
                yield picture, self.source.example(picture)
            step += 1

    def _pictures(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.steps_an_epoch)
        order = torch.Generator().manual_seed(seed_of("order", self.options.seed, epoch))
        permutation = torch.randperm(len(self.source.samples), generator=order)
        return permutation[place * self.pictures_a_step : (place + 1) * self.pictures_a_step].tolist()

    def _train_step(self, examples: Iterator[tuple[int, Example]]) -> StepRecord:
        kinds = [self._kind(picture) for picture in self._pictures(self.step)]
        self.optimizer.zero_grad(set_to_none=False)
        rows = self._gradients(examples)
        totals = sum_of(rows)
        if totals[0] == 0:
            return {"loss": float("nan"), "iou": float("nan"), "kinds": kinds}
        loss, overlap, _ = (totals[1:] / totals[0]).tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"lr: expected a run that stays finite, got a loss of {loss} in step {self.step + 1} with lr "
                f"{self.options.lr} and amp {self.options.amp}; the last checkpoint is kept"
            )
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= totals[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        record = {"loss": loss, "iou": overlap, "lr": rate, "kinds": kinds}
        return record | {"alpha_1": alpha_by_kind(rows, kinds)} if self.probe.routers else record

    def _kind(self, picture: int) -> str:
        """The kind of a picture's prompts in this step, the same for every process."""
        generator = torch.Generator().manual_seed(seed_of("kind", self.options.seed, self.step, picture))
        return draw_kind(self.options.mix, generator)

    def _gradients(self, examples: Iterator[tuple[int, Example]]) -> Tensor:
        """Gradients of the step, summed over pictures and processes, and a row (1, loss, IoU, alpha_1) a picture; zeros
        where it has no object."""
        pictures = self._pictures(self.step)
        places = list(range(self.rank, len(pictures), self.world))
        groups = [
            places[start : start + self.options.together] for start in range(0, len(places), self.options.together)
        ]
        parts = [self._accumulate([next(examples) for _ in group]) for group in groups]
        # A row a picture, others' rows being zero: their sum does not depend on who computed which.
        rows = torch.zeros(len(pictures), 4)
        if parts:
            rows[places] = torch.cat(parts).cpu()
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.world > 1:
                distributed.all_reduce(parameter.grad)
        if self.world > 1:
            distributed.all_reduce(rows)
        return rows

    def _accumulate(self, group: list[tuple[int, Example]]) -> Tensor:
        """Gradients summed over some pictures; a row (1, loss, IoU, alpha_1) each."""
        rows = torch.zeros(len(group), 4, device=self.sam.device)
        of_kind: dict[str, list[Drawn]] = {}
        for place, (picture, example) in enumerate(group):
            # Each picture has a generator of its own, so that its prompts do not depend on how pictures are shared out.
            generator = torch.Generator().manual_seed(seed_of("prompts", self.options.seed, self.step, picture))
            masks = self._chosen(example.masks, generator)
            if len(masks):
                of_kind.setdefault(self._kind(picture), []).append(Drawn(place, example, masks, generator))
        losses = [loss for kind, drawn in of_kind.items() for loss in self._losses(kind, drawn, rows)]
        if losses:
            self.scaler.scale(sum(losses[1:], start=losses[0])).backward()
        return rows

    def _losses(self, kind: str, drawn: list[Drawn], rows: Tensor) -> list[Tensor]:
        """The loss of each picture, the mean over its objects, all prompted alike; fills their ``rows``."""
        device = self.sam.device
        mask_size = self.sam.prompt_encoder.mask_input_size
        prompts = [
            draw_prompts(kind, one.masks, torch.full((len(one.masks),), index), one.generator, mask_size=mask_size)
            for index, one in enumerate(drawn)
        ]
        with torch.autocast(device.type, AMP_DTYPES[self.options.amp], enabled=self.options.amp != "off"):
            embeddings = torch.cat([self.source.embedding(one.example) for one in drawn])
            logits, _ = decode_prompts(self.sam, embeddings, joined_prompts(prompts).to(device), SINGLE_MASK)
        counts = [len(one.masks) for one in drawn]
        alphas = self.probe.alpha(len(logits), device).split(counts)
        losses = []
        for one, own, alpha in zip(drawn, logits.float().split(counts), alphas, strict=True):
            targets = one.masks[:, None].to(device, non_blocking=True).float()
            if self.options.loss == "points":
                losses.append(point_sampled_loss(own, targets, one.generator).mean())
            else:
                losses.append(whole_mask_loss(own, targets).mean())
            small = torch.nn.functional.adaptive_avg_pool2d(targets, own.shape[-2:])
            figures = (losses[-1].detach(), mask_overlap(own, small).mean(), alpha.mean())
            rows[one.place] = torch.stack([torch.ones_like(figures[0]), *figures])
        return losses

    def _chosen(self, masks: Tensor, generator: torch.Generator) -> Tensor:
        """The objects of a picture that this step takes."""
        masks = masks[masks.flatten(1).float().mean(1) >= self.options.minimum_area]
        return masks[torch.randperm(len(masks), generator=generator)[: self.options.objects]]

    def save_checkpoint(self) -> None:
        """Parameters, optimiser, schedule, step and minutes, written whole or not at all."""
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "samples": self._sample_contents(),
            "base": self._base_digest(),
            "plugin": self._plugin(),
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.updates},
            "scaler": self.scaler.state_dict(),
        }
        write_state(self.out, self.options, state)
        self.saved_minutes = self.minutes

    def resume(self) -> None:
        """Continue from the folder's checkpoint, if it has one.

        Raises:
            ValueError: the checkpoint is damaged, or of a run with other options, pictures or objects of another
                content, another base model or another method.
            OSError: the checkpoint or a picture cannot be read.
        """
        if not (self.out / CHECKPOINT).is_file():
            return
        state = read_state(self.out, self.options)
        out = printable(self.out)
        check_contents(self.out, state, self.source.samples, self.source.digests)
        now = self._plugin()
        if (then := state.get("plugin", now)) != now:
            raise ValueError(f"out: expected the plugin of the run in {out}, {then}, got {now}")
        with whole_checkpoint(self.out):
            names = list(state["parameters"])
        if names != list(self.parameters):
            raise ValueError(f"out: the run in {out} trains other parameters; choose an empty folder")
        if "base" in state and state["base"] != self._base_digest():
            raise ValueError(
                f"out: the run in {out} trains another base model: its frozen weights differ; choose an empty folder"
            )
        with whole_checkpoint(self.out), torch.no_grad():
            for name, parameter in self.parameters.items():
                if state["parameters"][name].shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(state['parameters'][name].shape)}")
                parameter.copy_(state["parameters"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.updates = int(state["schedule"]["last_epoch"])
            self.minutes = self.saved_minutes = float(state.get("minutes", 0.0))
            self.step = int(state["step"])

    def _plugin(self) -> dict[str, int | float | str]:
        """What the plugin is beside its weights; empty for a method without one."""
        plugins = [module for module in self.sam.modules() if isinstance(module, DeformableSampler)]
        return plugins[0].config() if plugins else {}

    def _base_digest(self) -> str:
        """The weights that the run leaves as they are, as a digest."""
        if self._base is None:
            self._base = fingerprint(self.sam, without=list(self.parameters))
        return self._base

    def _sample_contents(self) -> dict[str, Any]:
        """What the pictures and their objects were when the run began or went on."""
        if self._samples is None:
            self._samples = sample_contents(self.source.samples, self.source.digests)
        return self._samples
