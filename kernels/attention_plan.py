"""Block sizes of sampled_attention, and how its map is shared among programs.

The sizes are chosen by counting, with the compiler's report of registers and shared memory at hand
(bench/results/compile/triton.json), not by measurement. No call stops to tune itself.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

_MULTIPROCESSORS = 132  # of a Hopper GPU, where no device can be asked
_ROOMY = 160 << 10
_COST_OF_A_SHARE = 1.0  # starting a program and merging its result, in tiles
_BACKWARD_TILE = (4, 8)  # of both kernels: the second reads what the first has written by tiles


class AttentionPlan(NamedTuple):
    rows: int  # query rows of one program
    chunk: int  # channels blended at a time
    tile: tuple[int, int]
    warps: int
    resident: int  # programs that fit on one multiprocessor at once, by registers and shared memory
    precision: str = "tf32"  # of float32 dots; the half types know one only
    offsets_ahead: bool = False  # load them a tile ahead, since the addresses of all other loads wait for them

    @property
    def constants(self) -> dict[str, object]:
        """What a launch takes beyond its arguments."""
        return {
            "PRECISION": self.precision,
            "CHUNK": self.chunk,
            "ROWS": self.rows,
            "TILE_Y": self.tile[0],
            "TILE_X": self.tile[1],
            "OFFSETS_AHEAD": self.offsets_ahead,
            "num_warps": self.warps,
            "num_stages": 1,  # loads are gathered and blended, not copied: there is nothing to pipeline
        }


def _chunk(channels: int, largest: int) -> int:
    """At least what one instruction of the matrix units takes."""
    return min(largest, max(16, triton.next_power_of_2(channels)))


class Device(NamedTuple):
    """What a plan depends on."""

    multiprocessors: int
    roomy: bool  # shared memory for 128 rows of 256 channels twice, which not all GPUs have


def device_of(tensor: Tensor) -> Device:
    if tensor.device.type != "cuda":
        return Device(_MULTIPROCESSORS, True)
    properties = torch.cuda.get_device_properties(tensor.device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin >= _ROOMY)


def forward_plan(dtype: torch.dtype, channels: int, rows: int, device: Device) -> AttentionPlan:
    """Averages of all rows and channels stay in registers: 64 rows of 256 channels fill half of those of 4 warps."""
    if dtype == torch.float32:
        if channels > 256:
            return AttentionPlan(16, 64, (4, 4), 8, 2, "ieee")
        if not device.roomy:
            return AttentionPlan(32, _chunk(channels, 64), (4, 8), 8, 1, "ieee")
        return AttentionPlan(64, _chunk(channels, 64), (2, 4), 8, 1, "tf32x3", offsets_ahead=True)
    if channels > 256:
        return AttentionPlan(32, 64, (4, 8), 4, 2)
    if rows <= 64 or not device.roomy:
        return AttentionPlan(64, _chunk(channels, 32), (4, 8), 4, 2)
    return AttentionPlan(128, _chunk(channels, 64), (4, 8), 8, 1, offsets_ahead=True)


def tiles_plan(dtype: torch.dtype, channels: int, rows: int, device: Device) -> AttentionPlan:
    """Of the backward's first kernel, which holds the rows and their gradients in shared memory, and no sums."""
    if dtype == torch.float32:
        return AttentionPlan(16 if channels > 256 else 32, _chunk(channels, 64), _BACKWARD_TILE, 8, 1, "ieee")
    if channels > 256:
        return AttentionPlan(32 if device.roomy else 16, 64, _BACKWARD_TILE, 4, 1)
    if rows <= 64 or not device.roomy:
        return AttentionPlan(64, _chunk(channels, 64), _BACKWARD_TILE, 4, 2)
    return AttentionPlan(128, _chunk(channels, 128), _BACKWARD_TILE, 8, 1)


def rows_plan(dtype: torch.dtype, channels: int, rows: int) -> AttentionPlan:
    """Of the backward's second kernel, which holds the sums of all rows and channels in registers."""
    if dtype == torch.float32:
        if channels > 256:
            return AttentionPlan(32, 64, _BACKWARD_TILE, 8, 1, "tf32x3")
        return AttentionPlan(64, _chunk(channels, 32), _BACKWARD_TILE, 8, 1, "tf32x3")
    if channels > 256:
        return AttentionPlan(32, 64, _BACKWARD_TILE, 8, 1)
    if rows <= 64:
        return AttentionPlan(64, _chunk(channels, 64), _BACKWARD_TILE, 4, 2)
    return AttentionPlan(128, _chunk(channels, 64), _BACKWARD_TILE, 8, 1)


def split_tiles(programs: int, tiles: int, resident: int, device: Device) -> tuple[int, int]:
    """Into how many shares to cut the tiles of each program's map, and how many tiles a share has at most.

    As many as let the programs of one wave fill the device, and no more: each share costs a start and
    a result to merge.
    """
    return _split_tiles(programs, tiles, resident * device.multiprocessors)


@lru_cache(maxsize=4096)
def _split_tiles(programs: int, tiles: int, at_once: int) -> tuple[int, int]:
    def time(splits: int) -> float:
        waves = -(-programs * splits // at_once)
        return waves * (-(-tiles // splits) + _COST_OF_A_SHARE)

    most = min(tiles, max(1, 2 * at_once // programs))
    tiles_of_split = -(-tiles // min(range(1, most + 1), key=time))
    return -(-tiles // tiles_of_split), tiles_of_split
