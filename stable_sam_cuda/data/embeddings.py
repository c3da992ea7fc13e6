"""Image embeddings computed once and kept on disk: where the encoder is frozen, no epoch needs it again."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, distributed, nn

from stable_sam_cuda.data.dataset import fit_square
from stable_sam_cuda.data.digests import Digests
from stable_sam_cuda.data.samples import Sample
from stable_sam_cuda.files import atomic_write
from stable_sam_cuda.notes import note, printable

STORED = np.dtype(np.float16)
FRAMING = 1  # to be raised when `fit_square` makes another picture, so that cached embeddings are not mistaken
SUFFIX = ".npz"
STALE_SECONDS = 3600  # a file is written in far less: older ones are of processes that were killed
READINGS = 5  # of a picture that changes while it is read


class DamagedEntryError(ValueError):
    """A file of the cache that is not what was written."""


def fingerprint(module: nn.Module, without: Sequence[str] = ()) -> str:
    """SHA-256 over names, types and values of a module's state, but for some names."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if name not in without:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def cache_key(sam: Sam) -> str:
    """Digest of what decides on an embedding beside the picture: encoder, preprocessing, and the type on disk."""
    content = {
        "encoder": fingerprint(sam.image_encoder),
        "image_size": sam.image_encoder.img_size,
        "mean": hashlib.sha256(_bytes(sam.pixel_mean)).hexdigest(),
        "std": hashlib.sha256(_bytes(sam.pixel_std)).hexdigest(),
        "stored": STORED.str,
        "framing": FRAMING,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class EmbeddingCache:
    """Embeddings (C, h, w) of ``samples`` in ``FOLDER/KEY/DIGEST.npz``, one float16 array a file.

    KEY stands for encoder and preprocessing, DIGEST for the picture's content, so that a folder serves any pictures
    and encoders side by side, and any number of processes at the same time. A file appears whole or not at all, with
    a checksum. What is missing or damaged is computed anew, by itself.

    A picture that changes is another one, with an embedding of its own. The digests are those that the pictures had
    when the cache was opened, or when `fill` read them.
    """

    def __init__(self, folder: Path, sam: Sam, samples: Sequence[Sample], digests: Digests | None = None) -> None:
        """
        Args:
            digests: those of the samples that are known already.

        Raises:
            ValueError: a file of a sample is broken.
            OSError: a picture cannot be read; or embeddings are missing, and the folder cannot be written, or the
                disk is too small for them.
        """
        self.sam, self.samples, self.digests = sam, list(samples), digests or Digests()
        encoder = sam.prompt_encoder
        self.shape = (encoder.embed_dim, *encoder.image_embedding_size)
        self.key = cache_key(sam)
        self.folder = folder / self.key
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self._pictures = self.digests.of_pictures(self.samples)
        self._entry_bytes = len(self._content(self._pictures[0], np.zeros(self.shape, STORED))) if self.samples else 0
        if (folder / "cache.json").is_file() and (folder / "embeddings.npy").is_file():
            note("a cache of an earlier version is left alone and not used; its files can be deleted", folder)
        self._there = self._listed()
        missing = set(self._pictures) - self._there
        if missing:
            self._prepare(len(missing))

    @property
    def done(self) -> np.ndarray:
        """Which samples' embeddings are there, (N,) bool."""
        return np.array([picture in self._there for picture in self._pictures], bool)

    @torch.inference_mode()
    def fill(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Compute the missing embeddings; ``progress`` hears of each sample whose embedding is there now.

        It can be interrupted at any time, and loses nothing that is finished. Processes that fill the same cache
        share the work: each takes the pictures in an order of its own and skips what has appeared meanwhile.

        Raises:
            ValueError, OSError: a picture cannot be read, or its embedding cannot be written.
        """
        missing = np.flatnonzero(~self.done).tolist()
        own = missing[self.rank :: self.world]
        for part in (own, sorted(set(missing) - set(own))):
            random.SystemRandom().shuffle(part)
            for index in part:
                if self._pictures[index] not in self._there and not self._has_appeared(self._pictures[index]):
                    self._store(*self._computed(index))
                progress(1)

    def __getitem__(self, indices: list[int]) -> Tensor:
        """Embeddings (I, C, h, w) in float32; what is missing or damaged is computed now."""
        return torch.from_numpy(np.stack([self._embedding(index) for index in indices])).float()

    def path(self, index: int) -> Path:
        """The file of a sample's embedding."""
        return self._path(self._pictures[index])

    def _path(self, picture: str) -> Path:
        return self.folder / f"{picture}{SUFFIX}"

    def _listed(self) -> set[str]:
        """Pictures whose files are there, and as long as they must be; files that others left half written go."""
        there = set()
        wanted = set(self._pictures)
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as entries:
            for entry in entries:
                picture = entry.name.removesuffix(SUFFIX)
                with suppress(OSError):  # it may vanish meanwhile, or belong to someone else
                    if entry.name.endswith(".part") and time.time() - entry.stat().st_mtime > STALE_SECONDS:
                        os.unlink(entry.path)
                    elif picture in wanted and entry.name.endswith(SUFFIX) and self._is_whole(entry.path):
                        there.add(picture)
        return there

    def _is_whole(self, path: str | Path) -> bool:
        size = os.stat(path).st_size
        if size != self._entry_bytes:
            note("a damaged embedding is computed anew", f"{path} ({size} of {self._entry_bytes} bytes)")
        return size == self._entry_bytes

    def _has_appeared(self, picture: str) -> bool:
        try:
            appeared = os.stat(self._path(picture)).st_size == self._entry_bytes
        except OSError:
            return False
        if appeared:
            self._there.add(picture)
        return appeared

    def _prepare(self, missing: int) -> None:
        """Make the folder, and see that the missing embeddings can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.folder).close()
        except OSError as error:
            reason = f"cache: {missing} of {len(self.samples)} embeddings are missing, and the folder cannot be written"
            raise OSError(error.errno, f"{reason} ({error.strerror})", printable(self.folder)) from error
        needed, free = missing * self._entry_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            reason = f"the embeddings of {missing} pictures take {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free"
            raise OSError(errno.ENOSPC, f"No space left on device; {reason}", printable(self.folder))

    def _computed(self, index: int) -> tuple[str, np.ndarray]:
        """The digest of the picture that was read, and its embedding."""
        sample = self.samples[index]
        for _ in range(READINGS):
            known = self._pictures[index]
            image, ids = sample.load()
            picture = sample.picture_digest()
            if picture == known:
                break
            note("the picture has changed since the run began; it is used as it is now", sample.name)
            self._pictures[index] = picture
            self.digests.replace_picture(sample, picture)
        else:
            raise ValueError(f"{sample.name}: expected a picture that stays as it is while it is read")
        image, _ = fit_square(image, ids, self.sam.image_encoder.img_size)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(self.sam.device, torch.float32)
        embedding = self.sam.image_encoder(self.sam.preprocess(pixels))[0].to(torch.float16).cpu().numpy()
        return picture, embedding

    def _content(self, picture: str, embedding: np.ndarray) -> bytes:
        """A file's bytes: always as many. Its member names picture and key, so that a renamed file is noticed."""
        array, file = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array(array, np.ascontiguousarray(embedding), allow_pickle=False)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo(self._member(picture)), array.getvalue())
        return file.getvalue()

    def _member(self, picture: str) -> str:
        return f"{self.key}-{picture}.npy"

    def _store(self, picture: str, embedding: np.ndarray) -> None:
        # Without waiting for the disk: what a power failure leaves of a file does not pass its checksum.
        with atomic_write(self._path(picture), sync=False) as file:
            file.write(self._content(picture, embedding))
        self._there.add(picture)

    def _read(self, picture: str) -> np.ndarray:
        """A stored embedding (C, h, w) float16.

        Raises:
            DamagedEntryError: the file is missing, or is not what was written.
        """
        try:
            # Read, not mapped: a file that another process cuts short would end this one.
            with zipfile.ZipFile(io.BytesIO(self._path(picture).read_bytes())) as archive:
                array = np.lib.format.read_array(io.BytesIO(archive.read(self._member(picture))), allow_pickle=False)
        except MemoryError:
            raise
        except Exception as error:  # damage can make a zip file anything
            raise DamagedEntryError(" ".join(str(error).split()) or type(error).__name__) from error
        if array.shape != self.shape or array.dtype != STORED:
            raise DamagedEntryError(f"expected {STORED} {self.shape}, got {array.dtype} {array.shape}")
        return array

    @torch.inference_mode()
    def _embedding(self, index: int) -> np.ndarray:
        picture = self._pictures[index]
        try:
            return self._read(picture)
        except DamagedEntryError as error:
            if picture in self._there:
                note("a damaged embedding is computed anew", f"{self._path(picture)} ({error})")
        picture, embedding = self._computed(index)
        try:
            self._store(picture, embedding)
        except OSError as error:
            note("an embedding could not be stored, and will be computed again", f"{self._path(picture)} ({error})")
        return embedding


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
