"""Weights from files, into memory of the process's own.

Nothing stays mapped: a file may be written over, deleted or cut short at any time after, and the model's weights stay
what they are. And nothing is mapped while it is read, since cutting a mapped file short kills the process.
"""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SUFFIX = ".safetensors"
LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
# Names of the safetensors format.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class _BrokenFileError(Exception):
    """What is wrong with a file, for a message that begins with its name."""


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and metadata of a ``.safetensors`` file, at no more memory than the tensors take.

    Args:
        what: the file's role, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind, or another program changes it meanwhile.
        OSError: it cannot be read.
    """
    with _open(path, what) as file:
        try:
            return _read_tensors(file)
        except (_BrokenFileError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{what}: expected a whole {SUFFIX} file, got {path}: {error}") from error


def read_pytorch(path: Path, what: str) -> object:
    """What `torch.save` wrote, on the CPU; of its classes only tensors and plain containers, and no code is run.

    Args:
        what: the file's role, for messages.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_safetensors`, and where the file would run code on loading.
    """
    with _open(path, what) as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"
        if starts_as_zip and not zipfile.is_zipfile(file):
            raise ValueError(f"{what}: expected a whole PyTorch file, got {path}, which is truncated")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{what}: expected a PyTorch file of plain tensors, got {path}, which is damaged or would run code "
                f"on loading: {_first_line(error)}"
            ) from error
        except OSError:
            raise
        except Exception as error:  # whatever a damaged file makes the unpickler stumble over
            raise ValueError(f"{what}: expected a whole PyTorch file, got {path}: {_first_line(error)}") from error


@contextmanager
def _open(path: Path, what: str) -> Iterator[BinaryIO]:
    """The file to read; refuses one that changes before the block ends."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{what}: expected a file, got {path}, which {kind}")
    with open(path, "rb") as file:
        before = _state(file)
        try:
            yield file
        finally:
            # Whatever a reader says of a file that was half written meanwhile, this is the reason.
            if _state(file) != before:
                raise ValueError(
                    f"{what}: expected a file that stays as it is, got {path}, which another program changed while "
                    "it was read; load it again"
                )


def _state(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _read_tensors(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= LARGEST_HEADER:
        raise _BrokenFileError("it has no header of that format")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    if not all(isinstance(text, str) for text in metadata.values()):
        raise _BrokenFileError("its metadata are no text")
    end = 0
    tensors: dict[str, Tensor] = {}
    # In the order of the file, in which they fill it without a gap.
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = _dtype(entry["dtype"]), _shape(entry["shape"]), entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise _BrokenFileError(f"the place of {name} is not where its shape puts it")
        if os.fstat(file.fileno()).st_size < 8 + length + stop:
            raise _BrokenFileError("it is truncated")
        tensor = torch.empty(shape, dtype=dtype)
        # NumPy has no bfloat16, and no view as bytes of a tensor without a dimension.
        if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != stop - start:  # type: ignore[attr-defined]
            raise _BrokenFileError("it is truncated")
        tensors[name], end = tensor, stop
    if file.read(1):
        raise _BrokenFileError("there is more in it than its header tells")
    return tensors, metadata


def _dtype(name: Any) -> torch.dtype:
    if name not in DTYPES:
        raise _BrokenFileError(f"it holds {name}, which is none of {', '.join(DTYPES)}")
    return DTYPES[name]


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise _BrokenFileError(f"it holds a tensor of shape {sizes}")
    return tuple(sizes)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
