"""Pictures and objects of a training step, drawn in this process or by several others."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stable_sam_cuda.data.augmentation import augmented, paste_objects
from stable_sam_cuda.data.dataset import fit_square, object_masks
from stable_sam_cuda.data.digests import seed_of
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.training.pictures import prefetched

# How often a picture of a set is drawn, against 1: pictures with many objects teach the model to heed its prompt.
SET_WEIGHTS = {"coco_mini": 2.0, "bsds500": 1.5, "camvid": 1.0, "ccp_clothing": 1.5, "food_plates": 1.5, "ecssd": 0.7}
REGION_SETS = ("bsds500", "camvid")  # their masks are parts and stuff, which nobody would cut out
MINIMUM_AREA = 0.001  # of the input frame


@dataclass
class Batch:
    """images (I, 3, S, S) uint8, masks (K, S, S) bool of K objects, image_index (K,)."""

    images: Tensor
    masks: Tensor
    image_index: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU reads while the CPU goes on; `DataLoader` asks for it."""
        return Batch(*(value.pin_memory() for value in vars(self).values()))


@dataclass(frozen=True)
class Drawing:
    """How batches are drawn: ``batch`` pictures of ``size`` px, ``objects`` of each.

    Args:
        copy_paste: how often objects of another picture are pasted onto one, 0 to 1.
    """

    size: int
    batch: int
    objects: int
    copy_paste: float = 0.0


def draw_batch(
    samples: list[Sample],
    size: int,
    objects: int,
    rng: np.random.Generator,
    augment: bool = True,
    pasted: Sequence[Sample | None] = (),
) -> Batch:
    """Load ``samples``, frame them, and draw up to ``objects`` objects from each.

    Args:
        pasted: for each sample another one whose objects are pasted onto it, or None; empty for none at all.
    """
    images: list[Tensor] = []
    masks: list[np.ndarray] = []
    index: list[int] = []
    for sample, other in zip(samples, pasted or [None] * len(samples), strict=True):
        image, ids = sample.load()
        image, ids = augmented(image, ids, size, rng) if augment else fit_square(image, ids, size)
        if other is not None:
            image, ids = paste_objects(image, ids, *augmented(*other.load(), size, rng), rng)
        found = object_masks(ids, int(MINIMUM_AREA * size * size) if augment else 1)
        if augment and len(found) > objects:
            found = [found[i] for i in rng.choice(len(found), objects, replace=False)]
        elif augment and found:
            found = [found[i % len(found)] for i in range(objects)]
        masks += found
        index += [len(images)] * len(found)
        images.append(torch.from_numpy(image).permute(2, 0, 1))
    stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, size, size, dtype=torch.bool)
    return Batch(torch.stack(images), stacked, torch.tensor(index, dtype=torch.long))


class BatchStream(IterableDataset[Batch]):
    """Endless batches; each worker of a `DataLoader` draws its own, by a seed of its own."""

    def __init__(self, samples: list[Sample], drawing: Drawing, seed: int) -> None:
        self.samples, self.drawing, self.seed = samples, drawing, seed
        weights = np.array([SET_WEIGHTS.get(sample.set_name, 1.0) for sample in samples])
        self.chances = weights / weights.sum()
        self.cut_out = [sample for sample in samples if sample.set_name not in REGION_SETS]
        if drawing.copy_paste and not self.cut_out:
            raise ValueError(f"copy-paste: expected sets beside {', '.join(REGION_SETS)}, got none")

    def __iter__(self) -> Iterator[Batch]:
        worker, drawing = get_worker_info(), self.drawing
        rng = np.random.default_rng(self.seed if worker is None else seed_of("worker", self.seed, worker.id))
        while True:
            picks = rng.choice(len(self.samples), drawing.batch, replace=False, p=self.chances)
            others = [self._pasted(rng) for _ in picks] if drawing.copy_paste else []
            chosen = [self.samples[i] for i in picks]
            batch = draw_batch(chosen, drawing.size, drawing.objects, rng, pasted=others)
            if len(batch.masks):
                yield batch

    def _pasted(self, rng: np.random.Generator) -> Sample | None:
        return self.cut_out[rng.integers(len(self.cut_out))] if rng.random() < self.drawing.copy_paste else None


@contextmanager
def batches_of(stream: BatchStream, workers: int, pinned: bool = False) -> Iterator[Iterator[Batch]]:
    """The stream's batches, drawn ahead by one thread, or by so many ``workers``, processes of their own."""
    if workers == 0:
        thread = prefetched(iter(stream))
        try:
            yield thread
        finally:
            thread.close()
        return
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, worker_init_fn=_one_thread, pin_memory=pinned, prefetch_factor=2
    )
    yield iter(loader)


def _one_thread(worker: int) -> None:
    """OpenCV's own threads would fight for the cores that the other workers have.

    Ctrl-C is for the process that trains: it still finishes its step. SIGTERM is how that one ends its workers.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
