"""Training of the base model ``sam_lite``, with good prompts only.

    python -m stable_sam_cuda.training.sam_lite --data DATA --out RUN --minutes 60 --image-size 256

Tight boxes with SAM's own small jitter and 1 to 10 points, as SAM itself was trained: its weakness against
sloppy prompts is the model's own. The schedule is a cosine over the time budget, so a run ends when it was
told to, whatever the machine; ``--init`` continues from another run's weights (say at a larger image size).
Under ``torchrun`` each process draws ``--batch`` pictures of its own, and weights are averaged every 16 steps: on two
CPU cores, with a thread a process, that makes more of the time than averaged gradients or two threads.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, distributed
from torch.nn import Parameter

from stable_sam_cuda.evaluation.sharding import process_group, rank
from stable_sam_cuda.sam.lite import new_sam_lite, set_image_size
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK
from stable_sam_cuda.training.augment import augmented
from stable_sam_cuda.training.backbone import load_imagenet_weights
from stable_sam_cuda.training.checkpoint import load_weights, save_bytes, save_weights
from stable_sam_cuda.training.dataset import find_masked_images, fit_square, object_masks
from stable_sam_cuda.training.decoding import PromptBatch, decode_prompts
from stable_sam_cuda.training.losses import mask_loss, mask_overlap
from stable_sam_cuda.training.prefetch import prefetched
from stable_sam_cuda.training.prompts import boxes_from_masks, jittered_boxes, points_in_masks
from stable_sam_cuda.training.samples import Sample
from stable_sam_cuda.training.seeds import seed_of

# How often a picture of a set is drawn, against 1: pictures with many objects teach the model to heed its prompt.
SET_WEIGHTS = {"coco_mini": 2.0, "bsds500": 1.5, "camvid": 1.0, "ccp_clothing": 1.5, "food_plates": 1.5, "ecssd": 0.7}
POINT_COUNTS = (1, 1, 1, 2, 3, 5, 10)
MINIMUM_AREA = 0.001  # of the input frame
NEGATIVE_POINTS = 0.2  # how often points outside the object are added
STEPS_APART = 16  # steps that processes take by themselves before their weights are averaged
REFINEMENT = 0.2  # how often a step is followed by one with the first answer's logits and a corrective click


@dataclass
class Batch:
    """images (I, 3, S, S) float, masks (K, S, S) bool of K objects, image_index (K,)."""

    images: Tensor
    masks: Tensor
    image_index: Tensor


def draw_batch(samples: list[Sample], size: int, objects: int, rng: np.random.Generator, augment: bool = True) -> Batch:
    """Load ``samples``, frame them, and draw up to ``objects`` objects from each."""
    images, masks, index = [], [], []
    for sample in samples:
        image, ids = sample.load()
        image, ids = augmented(image, ids, size, rng) if augment else fit_square(image, ids, size)
        found = object_masks(ids, int(MINIMUM_AREA * size * size) if augment else 1)
        if augment and len(found) > objects:
            found = [found[i] for i in rng.choice(len(found), objects, replace=False)]
        elif augment and found:
            found = [found[i % len(found)] for i in range(objects)]
        masks += found
        index += [len(images)] * len(found)
        images.append(torch.from_numpy(image).permute(2, 0, 1))
    stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, size, size, dtype=torch.bool)
    return Batch(torch.stack(images).float(), stacked, torch.tensor(index, dtype=torch.long))


def draw_good_prompts(batch: Batch, generator: torch.Generator) -> PromptBatch:
    """A jittered box, or 1 to 10 points, for each object; one kind a step, so that shapes agree."""
    size = batch.masks.shape[-1]
    prompts = PromptBatch(batch.image_index)
    kind = torch.rand((), generator=generator).item()
    if kind < 0.5:
        prompts.boxes = jittered_boxes(boxes_from_masks(batch.masks), size, size, generator)
    if kind > 0.4:
        count = POINT_COUNTS[int(torch.randint(len(POINT_COUNTS), (), generator=generator))]
        prompts.points = points_in_masks(batch.masks, count, generator)
        prompts.labels = torch.ones(prompts.points.shape[:2])
        if torch.rand((), generator=generator).item() < NEGATIVE_POINTS:
            _add_points(prompts, points_in_masks(_surroundings(batch.masks), 1, generator), 0)
    return prompts


def _surroundings(masks: Tensor) -> Tensor:
    """Background pixels; all pixels for an object that fills the frame."""
    outside = ~masks
    outside[~outside.flatten(1).any(1)] = True
    return outside


def _add_points(prompts: PromptBatch, points: Tensor, label: int | Tensor) -> None:
    labels = torch.as_tensor(label, dtype=torch.float32).expand(points.shape[:1])[:, None].expand(points.shape[:2])
    prompts.points = torch.cat([prompts.points, points], 1) if prompts.points is not None else points
    prompts.labels = torch.cat([prompts.labels, labels], 1) if prompts.labels is not None else labels


def add_corrective_click(prompts: PromptBatch, masks: Tensor, logits: Tensor, generator: torch.Generator) -> None:
    """SAM's iterative training: the last answer's logits (K, 1, h, w) and one click in its error region."""
    prompts.masks = logits
    scale = masks.shape[-1] // logits.shape[-1]
    answer = (logits[:, 0] > 0).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    error = answer ^ masks
    error[~error.flatten(1).any(1)] = True
    click = points_in_masks(error, 1, generator)
    x, y = click[:, 0].long().unbind(1)
    _add_points(prompts, click, masks[torch.arange(len(masks)), y, x].float())


@torch.no_grad()
def open_to_prompts(sam: Sam, gain: float = 1.5, label_scale: float = 0.3) -> None:
    """Let an untrained decoder see where its prompts are.

    With independent random query and key projections, a prompt's position is invisible at first, and on little data
    the model settles on the salient object, whatever it is asked. Here both projections of each cross-attention
    start as the same orthogonal map, so that attention begins as similarity of positional encodings; the labels'
    embeddings start small beside them.
    """
    decoder, prompts = sam.mask_decoder.transformer, sam.prompt_encoder
    crossing = [decoder.final_attn_token_to_image]
    for block in decoder.layers:
        crossing += [block.cross_attn_token_to_image, block.cross_attn_image_to_token]
    for attention in crossing:
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
    for embedding in (*prompts.point_embeddings, prompts.not_a_point_embed, prompts.no_mask_embed):
        embedding.weight.mul_(label_scale)


def prompt_loss(
    sam: Sam, embeddings: Tensor, prompts: PromptBatch, masks: Tensor, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the single-mask output, of the best of the three, and of the predicted IoU.

    ``half`` runs the decoder, not the loss, in bfloat16 under autocast.

    Returns the scalar loss, the single-mask IoU (K,) and the single-mask logits (K, 1, h, w), detached.
    """
    with torch.autocast(embeddings.device.type, torch.bfloat16, enabled=half):
        logits, predicted_iou = (answer.float() for answer in decode_prompts(sam, embeddings, prompts))
    factor = masks.shape[-1] // logits.shape[-1]
    targets = torch.nn.functional.avg_pool2d(masks[:, None].float(), factor)
    losses = mask_loss(logits, targets)
    overlap = mask_overlap(logits, targets)
    total = losses[:, 0] + losses[:, 1:].min(dim=1).values + (predicted_iou - overlap).square().sum(1)
    return total.mean(), overlap[:, 0], logits[:, :1].detach()


def training_step(sam: Sam, batch: Batch, generator: torch.Generator, half: bool = False) -> tuple[Tensor, float]:
    """Loss of one batch, and its mean single-mask IoU."""
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=half):
        embeddings = sam.image_encoder(sam.preprocess(batch.images)).float()
    prompts = draw_good_prompts(batch, generator)
    loss, overlap, logits = prompt_loss(sam, embeddings, prompts, batch.masks, half)
    if torch.rand((), generator=generator).item() < REFINEMENT:
        add_corrective_click(prompts, batch.masks, logits, generator)
        loss = (loss + prompt_loss(sam, embeddings, prompts, batch.masks, half)[0]) / 2
    return loss, overlap.mean().item()


@torch.inference_mode()
def validate(sam: Sam, samples: list[Sample], size: int) -> dict[str, float]:
    """Mean over pictures of the mean IoU over their objects, in the input frame, by prompt kind."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    totals = {"gt_box": [], "1_point": [], "3_points": []}
    for sample in samples:
        batch = draw_batch([sample], size, 8, rng, augment=False)
        if not len(batch.masks):
            continue
        embeddings = sam.image_encoder(sam.preprocess(batch.images))
        kinds = {"gt_box": PromptBatch(batch.image_index, boxes=boxes_from_masks(batch.masks))}
        for count, name in ((1, "1_point"), (3, "3_points")):
            points = points_in_masks(batch.masks, count, generator)
            kinds[name] = PromptBatch(batch.image_index, points, torch.ones(points.shape[:2]))
        for name, prompts in kinds.items():
            logits, _ = decode_prompts(sam, embeddings, prompts, SINGLE_MASK)
            logits = torch.nn.functional.interpolate(logits, size=(size, size), mode="bilinear")
            totals[name].append(mask_overlap(logits, batch.masks[:, None].float()).mean().item())
    return {name: float(np.mean(values)) for name, values in totals.items()}


@torch.no_grad()
def average_weights(parameters: Iterable[Parameter]) -> None:
    """Every process's weights become the mean over processes (local SGD)."""
    parameters = list(parameters)
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    distributed.all_reduce(flat)
    parts = (flat / distributed.get_world_size()).split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def minutes_since(start: float, step: int) -> float:
    """Minutes since ``start`` (`time.monotonic`); where weights are averaged next, by the clock of process 0.

    So that all processes stop at the same step, and none waits for another in between.
    """
    minutes = torch.tensor((time.monotonic() - start) / 60, dtype=torch.float64)
    if distributed.is_initialized() and step % STEPS_APART == 0:
        distributed.broadcast(minutes, 0)
    return minutes.item()


def train(args: argparse.Namespace) -> None:
    """Run the training that the command line describes; see the module's docstring."""
    torch.manual_seed(args.seed)
    seed = seed_of("sam_lite", args.seed, rank())
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    samples = find_masked_images(args.data, "train")
    validation = find_masked_images(args.data, "val")
    weights = np.array([SET_WEIGHTS.get(sample.set_name, 1.0) for sample in samples])
    sam = new_sam_lite(args.variant, args.image_size)
    if args.init:
        load_weights(sam, args.init)
    else:
        load_imagenet_weights(sam.image_encoder.backbone, args.variant)
        open_to_prompts(sam)
    set_image_size(sam, args.image_size)
    average = torch.optim.swa_utils.AveragedModel(
        sam, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    )
    backbone = list(sam.image_encoder.backbone.parameters())
    known = {id(p) for p in backbone}
    others = [p for p in sam.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW(
        [{"params": backbone, "scale": 0.3}, {"params": others, "scale": 1.0}], lr=args.lr, weight_decay=0.01
    )
    args.out.mkdir(parents=True, exist_ok=True)
    first = rank() == 0
    log = (args.out / "log.jsonl").open("a") if first else None

    def report(record: dict[str, object]) -> None:
        print(json.dumps(record), file=log, flush=True)
        print(json.dumps(record), flush=True)

    def batches():
        while True:
            picks = rng.choice(len(samples), args.batch, replace=False, p=weights / weights.sum())
            batch = draw_batch([samples[i] for i in picks], args.image_size, args.objects, rng)
            if len(batch.masks):
                yield batch

    start, step, next_validation = time.monotonic(), 0, args.validate_minutes
    smooth_loss = smooth_overlap = None
    for batch in prefetched(batches()):
        minutes = minutes_since(start, step)
        progress = minutes / args.minutes
        together = step % STEPS_APART == 0 or not distributed.is_initialized()
        if (progress >= 1 and together) or (args.steps and step >= args.steps):
            break
        cosine = (1 + math.cos(math.pi * min(1, progress))) / 2
        rate = args.lr * min(1, (step + 1) / args.warmup) * (0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss, overlap = training_step(sam, batch, generator, args.half)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        if distributed.is_initialized() and step % STEPS_APART == STEPS_APART - 1:
            average_weights(sam.parameters())
        average.update_parameters(sam)
        step += 1
        smooth_loss = loss.item() if smooth_loss is None else 0.98 * smooth_loss + 0.02 * loss.item()
        smooth_overlap = overlap if smooth_overlap is None else 0.98 * smooth_overlap + 0.02 * overlap
        if first and step % 20 == 0:
            report({"step": step, "minutes": round(minutes, 2), "lr": rate, "loss": smooth_loss, "iou": smooth_overlap})
        if first and minutes > next_validation:
            next_validation += args.validate_minutes
            save_weights(average.module, args.out / "sam_lite.safetensors", variant=args.variant)
            value = validate(average.module, validation[::2], args.image_size)
            report({"step": step, "minutes": round(minutes, 2), "val": value})
    if not first:
        return
    save_weights(average.module, args.out / "sam_lite.safetensors", variant=args.variant)
    minutes = (time.monotonic() - start) / 60
    record = {"step": step, "minutes": minutes, "val": validate(average.module, validation, args.image_size)}
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    run = {**vars(args), "processes": processes, **record}
    save_bytes(args.out / "run.json", json.dumps(run, default=str, indent=2).encode())
    report(record)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with splits.json and SET/images, SET/masks")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and record")
    parser.add_argument("--init", type=Path, help="weights to start from; default: ImageNet backbone")
    parser.add_argument("--variant", default="lite0", choices=["lite0", "lite1"])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, help="stop after so many steps, if the time has not run out before")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--objects", type=int, default=3, help="objects a picture")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the averaged weights")
    parser.add_argument("--validate-minutes", type=float, default=15)
    parser.add_argument("--half", action="store_true", help="encoder and decoder in bfloat16 (autocast), not the loss")
    parser.add_argument("--seed", type=int, default=0)
    with process_group():
        train(parser.parse_args())


if __name__ == "__main__":
    main()
