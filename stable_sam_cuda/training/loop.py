"""Training on cached embeddings: SAM frozen, RTS prompts, HQ-SAM's loss; resumable, on any number of processes.

Nothing random is carried from step to step: each step's pictures, objects and prompts follow from the seed and
the step's number, so a run that was killed continues bit for bit, and processes that share a step draw alike.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, distributed, nn

from stable_sam_cuda.training.checkpoint import save_bytes
from stable_sam_cuda.training.dataset import fit_square, object_masks
from stable_sam_cuda.training.decoding import decode_prompts
from stable_sam_cuda.training.embeddings import EmbeddingCache, JoinedEmbeddings
from stable_sam_cuda.training.losses import mask_overlap, point_sampled_loss
from stable_sam_cuda.training.rts import ROBUST, PromptMix, draw_kind, draw_prompts
from stable_sam_cuda.training.samples import Sample

CHECKPOINT = "checkpoint.pt"


@dataclass
class TrainingOptions:
    """Options of one run. ``images`` pictures a step, at most ``objects`` objects of each."""

    epochs: int = 1
    images: int = 4
    objects: int = 3
    lr: float = 1e-3
    minimum_area: float = 0.001  # of the input frame; smaller objects are not trained on
    mix: PromptMix = field(default_factory=lambda: ROBUST)
    seed: int = 0
    checkpoint_every: int = 50


class PluginTrainer:
    """One run of ``train``; ``parameters`` are those that `install_method` returned for ``sam``."""

    def __init__(
        self,
        sam: Sam,
        parameters: dict[str, nn.Parameter],
        cache: EmbeddingCache | JoinedEmbeddings,
        out: Path,
        options: TrainingOptions,
    ) -> None:
        self.sam, self.parameters, self.cache, self.out, self.options = sam, parameters, cache, out, options
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        if options.images % self.world:
            raise ValueError(f"images: expected a multiple of the {self.world} processes, got {options.images}")
        self.steps_an_epoch = math.ceil(len(cache.samples) / options.images)
        self.steps = self.steps_an_epoch * options.epochs
        self.step = 0
        self.optimizer = torch.optim.Adam(parameters.values(), lr=options.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.02 + 0.98 * (1 + math.cos(math.pi * min(1, step / self.steps))) / 2
        )

    def run(self, progress: Callable[[dict[str, float]], None] = lambda record: None) -> None:
        """Train to the end; ``progress`` hears of every step's loss, IoU and seconds."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.sam.eval()
        while self.step < self.steps:
            started = time.perf_counter()
            loss, overlap = self._train_step()
            self.step += 1
            if self.rank == 0 and (self.step % self.options.checkpoint_every == 0 or self.step == self.steps):
                self.save_checkpoint()
            seconds = time.perf_counter() - started
            progress({"step": self.step, "loss": loss, "iou": overlap, "seconds": seconds})

    def _train_step(self) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(_mixed(self.options.seed, self.step))
        kind = draw_kind(self.options.mix, generator)
        share = [picture for place, picture in enumerate(self._pictures()) if place % self.world == self.rank]
        self.optimizer.zero_grad(set_to_none=False)
        totals = torch.zeros(3)
        for picture in share:
            # Each picture has a generator of its own, so that its prompts do not depend on how pictures are shared out.
            own = torch.Generator().manual_seed(_mixed(self.options.seed, self.step, picture))
            totals += self._accumulate(picture, kind, own)
        totals = self._reduce(totals)
        if totals[0] == 0:
            return float("nan"), float("nan")
        for parameter in self.parameters.values():
            parameter.grad /= totals[0]
        self.optimizer.step()
        self.schedule.step()
        return (totals[1] / totals[0]).item(), (totals[2] / totals[0]).item()

    def _pictures(self) -> list[int]:
        epoch, place = divmod(self.step, self.steps_an_epoch)
        order = torch.Generator().manual_seed(_mixed(self.options.seed, -1 - epoch))
        permutation = torch.randperm(len(self.cache.samples), generator=order)
        return permutation[place * self.options.images : (place + 1) * self.options.images].tolist()

    def _accumulate(self, picture: int, kind: str, generator: torch.Generator) -> Tensor:
        """Gradients summed over the objects of one picture; returns (objects, loss, IoU), the last two summed."""
        masks = load_framed_masks(self.cache.samples[picture], self.sam.image_encoder.img_size)
        masks = masks[masks.flatten(1).float().mean(1) >= self.options.minimum_area]
        masks = masks[torch.randperm(len(masks), generator=generator)[: self.options.objects]]
        if not len(masks):
            return torch.zeros(3)
        first = torch.zeros(len(masks), dtype=torch.long)
        mask_size = self.sam.prompt_encoder.mask_input_size
        prompts = draw_prompts(kind, masks, first, generator, mask_size=mask_size).to(self.sam.device)
        embedding = self.cache[[picture]].to(self.sam.device)
        logits = decode_prompts(self.sam, embedding, prompts)[0][:, :1]
        targets = masks[:, None].float().to(logits.device)
        loss = point_sampled_loss(logits, targets, generator).sum()
        loss.backward()
        small = torch.nn.functional.adaptive_avg_pool2d(targets, logits.shape[-2:])
        return torch.tensor([len(masks), loss.item(), mask_overlap(logits, small).sum().item()])

    def _reduce(self, totals: Tensor) -> Tensor:
        """Sum gradients and totals over all processes."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.world > 1:
                distributed.all_reduce(parameter.grad)
        if self.world > 1:
            distributed.all_reduce(totals)
        return totals

    def save_checkpoint(self) -> None:
        """Parameters, optimiser, schedule and step, written whole or not at all."""
        state = {
            "step": self.step,
            "options": asdict(self.options),
            "pictures": self._digest(),
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch, "last_lr": self.schedule.get_last_lr()},
        }
        buffer = BytesIO()
        torch.save(state, buffer)
        save_bytes(self.out / CHECKPOINT, buffer.getvalue())

    def resume(self) -> None:
        """Continue from the folder's checkpoint, if it has one.

        Raises:
            ValueError: the checkpoint belongs to a run with other options, other pictures or another method.
        """
        path = self.out / CHECKPOINT
        if not path.is_file():
            return
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["options"] != asdict(self.options):
            raise ValueError(
                f"out: expected the options of the run in {self.out}, {state['options']}, got {asdict(self.options)}"
            )
        if state["pictures"] != self._digest():
            raise ValueError(f"out: the run in {self.out} trains on other pictures; choose an empty folder")
        if list(state["parameters"]) != list(self.parameters):
            raise ValueError(f"out: the run in {self.out} trains other parameters; choose an empty folder")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.schedule._last_lr = state["schedule"]["last_lr"]
        self.step = state["step"]

    def _digest(self) -> str:
        """The pictures' names, in their order, as a digest."""
        return hashlib.sha256("\n".join(sample.name for sample in self.cache.samples).encode()).hexdigest()


def load_framed_masks(sample: Sample, size: int) -> Tensor:
    """Masks (K, S, S) bool of a picture's objects in SAM's input frame."""
    _, ids = fit_square(*sample.load(), size)
    found = object_masks(ids)
    return torch.stack([torch.from_numpy(mask) for mask in found]) if found else torch.zeros(0, size, size) > 0


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int.from_bytes(json.dumps(numbers).encode().ljust(1), "big") % (2**61 - 1)
