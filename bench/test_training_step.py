"""A step of the plugin's training from cached embeddings: decoder forward, loss, backward, Adam.

32 objects of 8 pictures on a GPU, 8 of 4 on a CPU; half types by autocast. "fused" is what a user gets, "reference" is
``backend="reference"``, "eager" grid_sample and two blends; decoder and loss are the same for all three.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import Contestant, Group, Run, Work
from contestants import fused_backend, sample_eagerly
from models import boxes, copied, embeddings, facts, image_size, in_float64, stable_sam, with_plugin, with_reference
from segment_anything.modeling import Sam
from timing import poisoned, relative_error
from torch import Tensor

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.data.prompts import PromptBatch
from stable_sam_cuda.sam import plugin_of
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK
from stable_sam_cuda.training.losses import whole_mask_loss
from stable_sam_cuda.training.step import decode_prompts

# Of the norm of the truth. Convolutions may take TF32 in float32.
LARGEST_ERROR = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LARGEST_ERROR_OF_GRADIENTS = {torch.float32: 0.1, torch.float16: 0.1, torch.bfloat16: 0.2}
LOSS_SCALE = 2.0**16  # in float16, where gradients of a mean over pixels would vanish otherwise; GradScaler's first

Batch = tuple[Tensor, PromptBatch, Tensor]  # embeddings (I, C, h, w), K boxes, masks (K, 1, side, side) of 0 and 1


class EagerPlugin(DeformableSampler):
    """The plugin as one writes it in PyTorch."""

    def forward(self, image_features: Tensor, output_token: Tensor) -> Tensor:
        network = self.offset_network
        projected = network.projection(image_features)
        hidden = F.gelu(network.norm(network.depthwise(projected).permute(0, 2, 3, 1)))
        inputs = {"projected": projected, "offsets": network.pointwise(hidden.permute(0, 3, 1, 2))}
        shares = {"features": image_features, "alpha": self.router(output_token), "max_offset": self.max_offset}
        return sample_eagerly(inputs | shares)


class TrainingStep:
    """One step on a batch. float16 without GradScaler's look for infinities."""

    def __init__(self, sam: Sam, batch: Batch, dtype: torch.dtype) -> None:
        self.sam, self.batch, self.dtype, self.plugin = sam, batch, dtype, plugin_of(sam)
        self.scale = LOSS_SCALE if dtype == torch.float16 else 1.0
        self.optimizer = torch.optim.Adam(self.plugin.parameters(), lr=5e-4)

    def backward(self) -> Tensor:
        """The loss, scaled."""
        features, prompts, masks = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        half = self.dtype if self.dtype.itemsize == 2 else None
        with torch.autocast(features.device.type, half, enabled=half is not None):
            logits, _ = decode_prompts(self.sam, features, prompts, SINGLE_MASK)
        loss = self.scale * whole_mask_loss(logits.to(masks.dtype), masks).mean()
        loss.backward()
        return loss.detach()

    def results(self) -> dict[str, Tensor]:
        """The loss, and the gradients of the plugin's two parts, each as one vector."""
        found = {"loss": self.backward() / self.scale}
        for name in ("offset_network", "router"):
            parameters = getattr(self.plugin, name).parameters()
            found[name] = torch.cat([parameter.grad.flatten() for parameter in parameters]) / self.scale
        return found

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


def make_problem(run: Run, pictures: int, objects: int, dtype: torch.dtype) -> tuple[Batch, dict[str, Tensor]]:
    """The batch, and what the step gives in float64 by plain PyTorch."""
    side, corners = image_size(run), boxes(pictures * objects, image_size(run)).to(run.device)
    pixels = torch.arange(side, device=run.device)
    x0, y0, x1, y1 = corners[:, :, None].unbind(1)
    inside = ((pixels >= x0) & (pixels < x1))[:, None, :] & ((pixels >= y0) & (pixels < y1))[:, :, None]
    index = torch.arange(pictures, device=run.device).repeat_interleave(objects)
    prompts = PromptBatch(index, boxes=corners)
    features, masks = embeddings(run, pictures), inside[:, None].float()
    exact = in_float64(stable_sam(run, torch.float32))
    truths = TrainingStep(exact, (features.double(), prompts, masks.double()), torch.float64).results()
    if dtype != torch.float32:  # gradients by offsets jump where rounding moves a location past an integer: too many
        del truths["offset_network"]
    return (features, prompts, masks), truths


def prepare(
    change: Callable[[Sam], Sam], run: Run, dtype: torch.dtype, problem: tuple[Batch, dict[str, Tensor]]
) -> Work:
    """``change`` makes the contestant's copy of the model."""
    batch, truths = problem
    step = TrainingStep(change(stable_sam(run, torch.float32)), batch, dtype)
    with poisoned([batch[0]] * 8):
        found = step.results()
    work = Work(step, {name: relative_error(found[name], truth) for name, truth in truths.items()})
    return work.verified(lambda name: (LARGEST_ERROR if name == "loss" else LARGEST_ERROR_OF_GRADIENTS)[dtype])


def training_groups(run: Run) -> Iterator[Group]:
    pictures, objects = (2, 2) if run.quick else (8, 4) if run.on_cuda else (4, 2)
    for dtype in (torch.bfloat16, torch.float32, torch.float16) if run.on_cuda else (torch.float32,):
        made = [
            Contestant("fused", partial(prepare, copied, run, dtype), fused_backend(run.device)),
            Contestant("eager", partial(prepare, partial(with_plugin, plugin=EagerPlugin), run, dtype)),
            Contestant("reference", partial(prepare, with_reference, run, dtype)),
        ]
        problem = partial(make_problem, run, pictures, objects, dtype)
        for cache in run.caches("step", pictures * objects):
            size = ("step", dtype, pictures * objects, cache, run.device, facts(run))
            yield Group("training_step", *size, problem, made, rounds=5)


@pytest.mark.groups(make=training_groups)
def test_training_step(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
