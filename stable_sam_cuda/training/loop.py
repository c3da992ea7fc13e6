"""The training loop: RTS prompts, HQ-SAM's loss; resumable, on any number of processes.

Nothing random is carried from step to step: each step's pictures, objects and prompts follow from the seed and
the step's number, so a run that was killed continues bit for bit, and processes that share a step draw alike.
(With a time budget the learning rate follows the clock, and two runs are no longer the same.)
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, distributed, nn

from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK
from stable_sam_cuda.training.decoding import decode_prompts
from stable_sam_cuda.training.losses import mask_overlap, point_sampled_loss
from stable_sam_cuda.training.options import AMP_DTYPES, TrainingOptions
from stable_sam_cuda.training.prefetch import prefetched
from stable_sam_cuda.training.router_probe import RouterProbe
from stable_sam_cuda.training.rts import draw_kind, draw_prompts, joined_prompts
from stable_sam_cuda.training.run_state import CHECKPOINT, read_state, remove_partial, write_state
from stable_sam_cuda.training.schedule import cosine
from stable_sam_cuda.training.sources import Example, PictureSource

CHECKPOINT_MINUTES = 5.0
StepRecord = dict[str, Any]


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

    def run(self, progress: Callable[[StepRecord], None] = lambda record: None) -> None:
        """Train to the end; ``progress`` hears of every step.

        Its record: step, loss, iou, seconds, lr, kind (of the prompts), and alpha_1 where there is a router.

        Raises:
            ValueError: no object is large enough, or the loss is no longer finite; the last checkpoint stays.
            OSError: a picture cannot be read or a checkpoint cannot be written; the last checkpoint stays.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            remove_partial(self.out)
        self.sam.eval()
        clock = time.perf_counter()
        with self.probe, closing(prefetched(self._examples())) as examples:
            while not self.finished:
                started = time.perf_counter()
                record = self._train_step(examples)
                self.step += 1
                self._check_objects()
                now = time.perf_counter()
                self._use_minutes((now - clock) / 60)
                clock = now
                if self.rank == 0 and self._checkpoint_is_due():
                    self.save_checkpoint()
                progress({"step": self.step, **record, "seconds": time.perf_counter() - started})

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
        order = torch.Generator().manual_seed(_mixed(self.options.seed, -1 - epoch))
        permutation = torch.randperm(len(self.source.samples), generator=order)
        return permutation[place * self.pictures_a_step : (place + 1) * self.pictures_a_step].tolist()

    def _train_step(self, examples: Iterator[tuple[int, Example]]) -> StepRecord:
        generator = torch.Generator().manual_seed(_mixed(self.options.seed, self.step))
        kind = draw_kind(self.options.mix, generator)
        self.optimizer.zero_grad(set_to_none=False)
        totals = self._gradients(kind, examples)
        if totals[0] == 0:
            return {"loss": float("nan"), "iou": float("nan"), "kind": kind}
        loss, overlap, alpha = (totals[1:] / totals[0]).tolist()
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
        record = {"loss": loss, "iou": overlap, "lr": rate, "kind": kind}
        return record | {"alpha_1": alpha} if self.probe.routers else record

    def _gradients(self, kind: str, examples: Iterator[tuple[int, Example]]) -> Tensor:
        """Gradients of the step, summed over objects and processes; (objects, loss, IoU, alpha_1), summed alike."""
        pictures = self._pictures(self.step)
        places = list(range(self.rank, len(pictures), self.world))
        groups = [
            places[start : start + self.options.together] for start in range(0, len(places), self.options.together)
        ]
        parts = [self._accumulate([next(examples) for _ in group], kind) for group in groups]
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
        totals = torch.zeros(4)
        for row in rows:
            totals += row
        return totals

    def _accumulate(self, group: list[tuple[int, Example]], kind: str) -> Tensor:
        """Gradients summed over the objects of some pictures; a row (objects, loss, IoU, alpha_1) a picture."""
        device = self.sam.device
        found = []
        for picture, example in group:
            # Each picture has a generator of its own, so that its prompts do not depend on how pictures are shared out.
            generator = torch.Generator().manual_seed(_mixed(self.options.seed, self.step, picture))
            masks = self._chosen(example.masks, generator)
            found.append((example, masks, generator))
        rows = torch.zeros(len(group), 4, device=device)
        places = [place for place, (_, masks, _) in enumerate(found) if len(masks)]
        if not places:
            return rows
        used = [found[place] for place in places]
        mask_size = self.sam.prompt_encoder.mask_input_size
        prompts = []
        for index, (_, masks, generator) in enumerate(used):
            owner = torch.full((len(masks),), index)
            prompts.append(draw_prompts(kind, masks, owner, generator, mask_size=mask_size))
        with torch.autocast(device.type, AMP_DTYPES[self.options.amp], enabled=self.options.amp != "off"):
            embeddings = torch.cat([self.source.embedding(example) for example, _, _ in used])
            logits, _ = decode_prompts(self.sam, embeddings, joined_prompts(prompts).to(device), SINGLE_MASK)
        counts = [len(masks) for _, masks, _ in used]
        alphas = self.probe.alpha(len(logits), device).split(counts)
        losses = []
        for place, own, alpha, (_, masks, generator) in zip(
            places, logits.float().split(counts), alphas, used, strict=True
        ):
            targets = masks[:, None].to(device, non_blocking=True).float()
            losses.append(point_sampled_loss(own, targets, generator).sum())
            small = torch.nn.functional.adaptive_avg_pool2d(targets, own.shape[-2:])
            sums = (losses[-1].detach(), mask_overlap(own, small).sum(), alpha.sum())
            rows[place] = torch.stack([torch.full_like(sums[0], len(masks)), *sums])
        self.scaler.scale(sum(losses[1:], start=losses[0])).backward()
        return rows

    def _chosen(self, masks: Tensor, generator: torch.Generator) -> Tensor:
        """The objects of a picture that this step takes."""
        masks = masks[masks.flatten(1).float().mean(1) >= self.options.minimum_area]
        return masks[torch.randperm(len(masks), generator=generator)[: self.options.objects]]

    def save_checkpoint(self) -> None:
        """Parameters, optimiser, schedule, step and minutes, written whole or not at all."""
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "pictures": self._digest(),
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
            ValueError: the checkpoint is damaged, or of a run with other options, other pictures or another method.
        """
        if not (self.out / CHECKPOINT).is_file():
            return
        state = read_state(self.out, self.options)
        if state["pictures"] != self._digest():
            raise ValueError(f"out: the run in {self.out} trains on other pictures; choose an empty folder")
        if list(state["parameters"]) != list(self.parameters):
            raise ValueError(f"out: the run in {self.out} trains other parameters; choose an empty folder")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.updates = state["schedule"]["last_epoch"]
        self.minutes = self.saved_minutes = state.get("minutes", 0.0)
        self.step = state["step"]

    def _digest(self) -> str:
        """The pictures' names, in their order, as a digest."""
        return hashlib.sha256("\n".join(sample.name for sample in self.source.samples).encode()).hexdigest()


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int.from_bytes(json.dumps(numbers).encode().ljust(1), "big") % (2**61 - 1)
