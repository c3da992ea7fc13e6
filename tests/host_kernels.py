"""Builds the CUDA kernels for the host under tests/cuda/shim and runs them on tensors."""

import ctypes
import math
import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from sample_inputs import NAMES
from torch import Tensor

from stable_sam_cuda.ops.deformable_sample import BACKWARD_SCHEMA, SCHEMA

ROOT = Path(__file__).resolve().parents[1]
SHIM = ROOT / "tests" / "cuda" / "shim"
COMPILE = ["g++", "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class KernelError(Exception):
    """The host build stopped: what AddressSanitizer, UndefinedBehaviorSanitizer or the shim said."""


def build(folder: Path, sources: Path = ROOT / "csrc", defines: tuple[str, ...] = ()) -> "HostKernels":
    """Compile ``sources``'s kernels into ``folder``."""
    program = folder / "kernels_on_host"
    files = [str(SHIM / "kernels_on_host.cpp"), str(SHIM / "block_runner.cpp")]
    # The shim's folder comes first: its headers stand in for CUDA's.
    command = [*COMPILE, *SANITIZE, *defines, f"-I{SHIM}", f"-I{sources / 'cuda'}", *files, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return HostKernels(program, folder)


RENAMED = {  # torch's functions that the shim counts
    "torch_call_dispatcher": "shim_call_dispatcher",
    "aoti_torch_create_device_guard": "shim_create_device_guard",
    "aoti_torch_delete_device_guard": "shim_delete_device_guard",
    "aoti_torch_get_current_cuda_stream": "shim_get_current_cuda_stream",
}


class HostOperators:
    """The operators' entry points: ``operators.deformable_sample`` and its backward take tensors of the CPU."""

    def __init__(self, folder: Path) -> None:
        """Compile them into ``folder``; once a process, because they are registered."""
        torch_folder = Path(torch.__file__).parent
        defines = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        defines += [f"-D{name}={own}" for name, own in RENAMED.items()]
        files = [str(SHIM / "operators_on_host.cpp"), str(SHIM / "block_runner.cpp")]
        command = [*COMPILE, "-shared", "-fPIC", *defines, f"-I{SHIM}", f"-I{ROOT / 'csrc' / 'cuda'}", "-isystem"]
        command += [str(torch_folder / "include"), *files, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        library = folder / "operators_on_host.so"
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        self._schemas = torch.library.Library("stable_sam_on_host", "DEF")
        self._schemas.define(f"deformable_sample{SCHEMA}")
        self._schemas.define(f"deformable_sample_backward{BACKWARD_SCHEMA}")
        torch.ops.load_library(library)
        self.operators = torch.ops.stable_sam_on_host
        self.shim = ctypes.CDLL(str(library))


@dataclass(frozen=True)
class HostKernels:
    program: Path
    folder: Path

    def plan(self, batch: int, height: int, width: int, channels: int, max_offset: float) -> tuple[int, int, int]:
        """A tile's columns, and rows and columns of its halo: 0 rows where the halo is not kept."""
        words = [str(word) for word in (batch, height, width, channels, max_offset)]
        done = subprocess.run([self.program, "plan", *words], capture_output=True, text=True, check=True)
        columns, halo_rows, halo_columns = map(int, done.stdout.split())
        return columns, halo_rows, halo_columns

    def forward(self, inputs: dict[str, Tensor | None], max_offset: float, **options: int) -> Tensor:
        """The output (B, C, H, W); ``options`` as in _run."""
        (output,) = self._run(inputs, max_offset, None, 0, **options)
        assert output is not None
        return output

    def backward(
        self, grad_output: Tensor, inputs: dict[str, Tensor | None], max_offset: float, grad_mask: int, **options: int
    ) -> dict[str, Tensor]:
        """The gradients that ``grad_mask`` asks for, by name."""
        gradients = self._run(inputs, max_offset, grad_output, grad_mask, **options)
        return {name: gradient for name, gradient in zip(NAMES, gradients, strict=True) if gradient is not None}

    def _run(
        self,
        inputs: dict[str, Tensor | None],
        max_offset: float,
        grad_output: Tensor | None,
        grad_mask: int,
        misalignment: int = 0,
        backwards: int = 0,
        without_halo: int = 0,
    ) -> list[Tensor | None]:
        """``misalignment``: bytes by which every array misses a 16-byte boundary; ``backwards``: last thread first;
        ``without_halo``: as if a tile's halo were too large for shared memory (no channel amplitude there).
        """
        features, offsets, identity, alpha, amplitude = (inputs[name] for name in NAMES)
        assert features is not None and offsets is not None
        batch = torch.broadcast_shapes(*[t.shape[:1] for t in inputs.values() if t is not None])[0]
        channels, height, width = features.shape[1:]
        amplitude_channels = 0 if amplitude is None else amplitude.shape[1]

        def batch_stride(tensor: Tensor | None) -> int:
            return 0 if tensor is None or tensor.shape[0] == 1 else math.prod(tensor.shape[1:])

        shape = struct.pack(
            "<13qd",
            *(batch, height, width, channels),
            *(batch_stride(tensor) for tensor in (features, identity, alpha, amplitude)),
            amplitude_channels,
            0 if offsets.shape[0] == 1 else offsets.stride(0),
            *offsets.stride()[1:],
            max_offset,
        )
        header = struct.pack(
            "<9q",
            grad_output is not None,
            features.element_size(),
            features.dtype == torch.bfloat16,
            grad_mask,
            misalignment,
            backwards,
            without_halo,
            features.shape[0],
            0 if identity is None else identity.shape[0],
        )
        arrays = [pixels(grad_output), pixels(features), memory_of(offsets), pixels(identity), alpha, pixels(amplitude)]
        case, results = self.folder / "case", self.folder / "results"
        case.write_bytes(header + shape + b"".join(counted_bytes(array) for array in arrays))
        environment = dict(
            os.environ, ASAN_OPTIONS="detect_stack_use_after_return=0", UBSAN_OPTIONS="print_stacktrace=1"
        )
        done = subprocess.run([self.program, case, results], capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise KernelError(done.stderr)

        image = (height, width, channels)
        if grad_output is None:
            shapes = [(batch, *image)]
        else:
            identity_batch = 0 if identity is None else identity.shape[0]
            shapes = [(features.shape[0], *image), (batch, 2, height, width), (identity_batch, *image), (batch, 2)]
            shapes.append((batch, height, width, amplitude_channels))
        outputs = read_arrays(results.read_bytes(), shapes, features.dtype)
        # Offsets' and alpha's gradients are as they are; all others come channels-last.
        plain = () if grad_output is None else (1, 3)
        return [t if t is None or i in plain else t.permute(0, 3, 1, 2) for i, t in enumerate(outputs)]


def pixels(tensor: Tensor | None) -> Tensor | None:
    """(B, C, H, W) as dense (B, H, W, C)."""
    return None if tensor is None else tensor.detach().permute(0, 2, 3, 1).contiguous()


def memory_of(tensor: Tensor) -> Tensor:
    """All memory from the first to the last element of a strided tensor."""
    if tensor.numel() == 0:
        return tensor.detach().flatten()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((last + 1,), (1,))


def counted_bytes(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return struct.pack("<q", -1)
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return struct.pack("<q", len(data)) + data


def read_arrays(data: bytes, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor | None]:
    arrays: list[Tensor | None] = []
    position = 0
    for shape in shapes:
        (count,) = struct.unpack_from("<q", data, position)
        position += 8
        if count < 0:
            arrays.append(None)
            continue
        flat = torch.frombuffer(bytearray(data[position : position + count]) or bytearray(1), dtype=torch.uint8)[:count]
        arrays.append(flat.view(dtype).view(shape))
        position += count
    return arrays
