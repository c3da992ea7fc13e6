"""Image embeddings computed once and kept on disk: the encoder is frozen, so no epoch needs it again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

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
    its embedding has been flushed. A cache of other pictures or of another encoder is refused.
    """

    def __init__(self, folder: Path, sam: Sam, samples: Sequence[Sample]) -> None:
        """
        Raises:
            ValueError: the folder holds the cache of another encoder or of other pictures.
        """
        self.folder, self.sam, self.samples = folder, sam, list(samples)
        size = sam.prompt_encoder.image_embedding_size
        self.shape = (len(samples), sam.prompt_encoder.embed_dim, *size)
        description = {
            "encoder": fingerprint(sam.image_encoder),
            "image_size": sam.image_encoder.img_size,
            "names": hashlib.sha256("\n".join(sample.name for sample in samples).encode()).hexdigest(),
            "shape": list(self.shape),
        }
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "cache.json"
        if not record.is_file():
            np.lib.format.open_memmap(folder / "embeddings.npy", "w+", np.float16, self.shape).flush()
            np.save(folder / "done.npy", np.zeros(len(samples), bool))
            save_bytes(record, json.dumps(description, indent=2).encode())
        elif (found := json.loads(record.read_text())) != description:
            differing = [key for key in description if found.get(key) != description[key]]
            raise ValueError(f"cache: {folder} was made with another {' and '.join(differing)}; choose an empty folder")
        self.done = np.load(folder / "done.npy")
        self.embeddings = np.lib.format.open_memmap(folder / "embeddings.npy", "r+")

    @torch.inference_mode()
    def fill(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Compute the missing embeddings; ``progress`` hears of each finished picture."""
        device = self.sam.device
        for index in np.flatnonzero(~self.done):
            image, _ = fit_square(*self.samples[index].load(), self.sam.image_encoder.img_size)
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device, torch.float32)
            self.embeddings[index] = self.sam.image_encoder(self.sam.preprocess(pixels))[0].half().cpu().numpy()
            self.done[index] = True
            progress(1)
            if self.done[: index + 1].sum() % FLUSH_EVERY == 0:
                self._flush()
        self._flush()

    def _flush(self) -> None:
        self.embeddings.flush()
        done = self.folder / "done.npy.new"
        with done.open("wb") as file:
            np.save(file, self.done)
        done.replace(self.folder / "done.npy")

    def __getitem__(self, indices: list[int]) -> Tensor:
        """Embeddings (I, C, h, w) in float32."""
        return torch.from_numpy(self.embeddings[indices]).float()


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
