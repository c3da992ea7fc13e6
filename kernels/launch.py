"""Block sizes and the launch itself.

The sizes are fixed, chosen by dtype and channel count alone, so that no call stops to tune itself.
They are chosen by counting (bytes in flight, instructions a byte, registers), not by measurement.
"""

import contextlib

import torch
import triton
from torch import Tensor

_LINE_BYTES = 128  # an L1 line: what one pixel of one tile gives to a channel block
_VECTOR_BYTES = 16  # the widest load of one thread
INTERPRETED = triton.knobs.runtime.interpret
WARPS = 4  # of a program that works on a tile of pixels


def channel_block(features: Tensor) -> int:
    """Channels that a program handles at a time: one cache line of each pixel, or all there are."""
    return min(_LINE_BYTES // features.element_size(), triton.next_power_of_2(features.shape[1]))


def channel_alignment(features: Tensor) -> int:
    """Largest power of two, up to one 16-byte vector, that divides the channel count."""
    channels = features.shape[1]
    return min(_VECTOR_BYTES // features.element_size(), channels & -channels)


def pixel_tile(features: Tensor, loads: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of the tile in which each thread makes ``loads`` loads a tensor.

    Where the channel count allows narrow loads only the tile shrinks, for each load costs the registers
    of an address; where channels are few it grows, to keep all threads busy.
    """
    pixels = loads * 32 * WARPS * channel_alignment(features) // channel_block(features)
    pixels = min(max(pixels, 8), 256)
    rows = 1 << (pixels.bit_length() - 1) // 2
    return rows, pixels // rows


def tile_count(height: int, width: int, tile: tuple[int, int]) -> int:
    return triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1])


def launch(kernel, programs: int, device: torch.device, *arguments, num_warps: int, **constants) -> None:
    """Run ``programs`` instances of a kernel on ``device``, which need not be the current one.

    Fused multiply-adds are asked for by name: Triton is about to turn them off by default.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=True)
