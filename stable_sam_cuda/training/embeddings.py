"""Image embeddings computed once and kept on disk: where the encoder is frozen, no epoch needs it again."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, distributed, nn

from stable_sam_cuda.training.checkpoint import save_bytes
from stable_sam_cuda.training.dataset import fit_square
from stable_sam_cuda.training.samples import Sample

FLUSH_EVERY = 32


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class EmbeddingCache:
    """Float16 embeddings (N, C, h, w), memory-mapped, in the order of ``samples``.

    ``fill`` computes what is missing and can be interrupted at any time: a picture counts as done only after
    its embedding has been flushed. A cache of other pictures or of another encoder is refused. Several processes
    of one machine share the work, and the folder.
    """

    def __init__(self, folder: Path, sam: Sam, samples: Sequence[Sample]) -> None:
        """
        Raises:
            ValueError: the folder holds the cache of another encoder or of other pictures, or a damaged one.
            OSError: the folder cannot be written, or the disk is too small for the embeddings.
        """
        self.folder, self.sam, self.samples = folder, sam, list(samples)
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        size = sam.prompt_encoder.image_embedding_size
        self.shape = (len(self.samples), sam.prompt_encoder.embed_dim, *size)
        description = {
            "encoder": fingerprint(sam.image_encoder),
            "image_size": sam.image_encoder.img_size,
            "names": hashlib.sha256("\n".join(sample.name for sample in self.samples).encode()).hexdigest(),
            "shape": list(self.shape),
        }
        if self.rank == 0 and not (folder / "cache.json").is_file():
            self._create(description)
        if self.world > 1:
            distributed.barrier()
        self.done, self.embeddings = self._open(description)

    def _create(self, description: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "embeddings.npy"
        np.lib.format.open_memmap(path, "w+", np.float16, self.shape).flush()
        try:
            _reserve(path)
        except OSError as error:
            needed = path.stat().st_size / 2**30
            path.unlink()
            text = f"{error.strerror}; the embeddings of {len(self.samples)} pictures take {needed:.2f} GiB"
            raise OSError(error.errno, text, str(self.folder)) from error
        np.save(self.folder / "done.npy", np.zeros(len(self.samples), bool))
        save_bytes(self.folder / "cache.json", json.dumps(description, indent=2).encode())

    def _open(self, description: dict[str, Any]) -> tuple[np.ndarray, np.memmap]:
        try:
            found = json.loads((self.folder / "cache.json").read_text())
            differing = [key for key in description if found.get(key) != description[key]]
            done = np.load(self.folder / "done.npy")
            path = self.folder / "embeddings.npy"
            # Opening a file that is too short would lengthen it, by embeddings of nothing but zeros.
            if not differing and path.stat().st_size < np.float16().nbytes * math.prod(self.shape):
                raise EOFError(f"{path} is too short")
            embeddings = np.lib.format.open_memmap(path, "r+")
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise ValueError(f"cache: expected a whole cache in {self.folder}, got a damaged one: {error}") from error
        if differing:
            raise ValueError(
                f"cache: {self.folder} was made with another {' and '.join(differing)}; choose an empty folder"
            )
        return done, embeddings

    @torch.inference_mode()
    def fill(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Compute the missing embeddings; ``progress`` hears of each finished picture."""
        device = self.sam.device
        missing = np.flatnonzero(~self.done)
        for start in range(0, len(missing), FLUSH_EVERY * self.world):
            chunk = missing[start : start + FLUSH_EVERY * self.world]
            for index in chunk[self.rank :: self.world].tolist():
                image, ids = self.samples[index].load()
                image, _ = fit_square(image, ids, self.sam.image_encoder.img_size)
                pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device, torch.float32)
                self.embeddings[index] = self.sam.image_encoder(self.sam.preprocess(pixels))[0].half().cpu().numpy()
                self.done[index] = True
                progress(1)
            self._flush()
            if self.world > 1:
                progress(len(chunk) - len(chunk[self.rank :: self.world]))

    def _flush(self) -> None:
        self.embeddings.flush()
        if self.world > 1:
            done = torch.from_numpy(self.done.astype(np.uint8))
            distributed.all_reduce(done, distributed.ReduceOp.MAX)
            self.done = done.numpy().astype(bool)
        if self.rank == 0:
            path = self.folder / "done.npy.new"
            with path.open("wb") as file:
                np.save(file, self.done)
            path.replace(self.folder / "done.npy")

    def __getitem__(self, indices: list[int]) -> Tensor:
        """Embeddings (I, C, h, w) in float32."""
        return torch.from_numpy(self.embeddings[indices]).float()


def _reserve(path: Path) -> None:
    """Take a sparse file's space on the disk now: a full disk is an error here, and a fatal signal when mapped."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class JoinedEmbeddings:
    """Several caches one after the other, as one: pictures made later do not ask for the others' embeddings again."""

    def __init__(self, caches: list[EmbeddingCache]) -> None:
        self.caches = caches
        self.samples = [sample for cache in caches for sample in cache.samples]

    def __getitem__(self, indices: list[int]) -> Tensor:
        """Embeddings (I, C, h, w) in float32."""
        return torch.cat([self._embedding(index) for index in indices])

    def _embedding(self, index: int) -> Tensor:
        for cache in self.caches:
            if index < len(cache.samples):
                return cache[[index]]
            index -= len(cache.samples)
        raise IndexError("picture beyond the last one")
