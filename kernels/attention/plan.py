"""Block sizes of sampled_attention.

The sizes are chosen by counting, with the compiler's report of registers and shared memory at hand
(bench/compile_matrix.py), not by measurement. No call stops to tune itself.
"""

from typing import NamedTuple

import torch
import triton

from ..launch import Device

TILES_KERNEL = "sampled_attention's backward"
ROWS_KERNEL = "sampled_attention's backward by query rows"
BACKWARD_TILE = (4, 8)  # of both kernels: the second reads what the first has written by tiles
_SUMS = 64 * 256  # rows times channels whose sums in float32 fill half of the registers of 4 warps
_LONG_SIDE = 32  # channels of a product that is rows of tile.dot's result: fewer than 64


class AttentionPlan(NamedTuple):
    rows: int  # query rows of one program
    chunk: int  # channels blended at a time
    tile: tuple[int, int]
    warps: int
    resident: int  # programs that fit on one multiprocessor at once, by registers and shared memory
    shared_bytes: int  # of one program: at least what the compiler takes for any architecture that may take this plan
    precision: str = "tf32"  # of float32 dots; the half types know one only
    offsets_ahead: bool = False  # load them a tile ahead, since the addresses of all other loads wait for them
    registers: int | None = None  # of a thread, at most

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
            "maxnreg": self.registers,
            "num_stages": 1,  # loads are gathered and blended, not copied: there is nothing to pipeline
        }


def plan_name(kernel: str, dtype: torch.dtype, channels: int) -> str:
    """What is refused or not on a device, as a user reads it."""
    return f"{kernel} of {channels} channels in {str(dtype).removeprefix('torch.')}"


def _chunk(channels: int, largest: int) -> int:
    """At least what one instruction of the matrix units takes."""
    return min(largest, max(16, triton.next_power_of_2(channels)))


def _most_rows(channels: int, sums: int = _SUMS) -> int:
    """A power of two from 16, the least that the matrix units take, so that sums of this many elements suffice."""
    return max(16, min(64, triton.next_power_of_2(sums // channels + 1) // 2))


def _has_tf32x3(device: Device) -> bool:
    """Before 3.8 Triton compiles products of three tf32 parts into a trap for sm_100, whose matrix units differ."""
    return not 100 <= device.capability < 120


def forward_plans(dtype: torch.dtype, channels: int, rows: int, device: Device) -> list[AttentionPlan]:
    """Plans of the forward, the best first. Averages of all rows and channels stay in registers.

    A tile has at least 16 pixels: the weights times u is a product over them, and Triton before 3.8 refuses fewer.
    """
    padded = triton.cdiv(channels, 64) * 64

    def plan(rows: int, tile: tuple[int, int], warps: int, resident: int, **rest) -> AttentionPlan:
        pixels = tile[0] * tile[1]
        if rest.get("precision") == "tf32x3":
            shared = 2 * padded * rows * dtype.itemsize + 12_288
        else:
            shared = padded * (rows + pixels) * dtype.itemsize + 8192
        return AttentionPlan(rows, _chunk(channels, _LONG_SIDE), tile, warps, resident, shared, **rest)

    most = _most_rows(channels)
    plans = []
    if dtype == torch.float32:
        precision = "tf32x3" if _has_tf32x3(device) else "ieee"
        if most == 64:
            plans.append(plan(64, (4, 4), 8, 1, precision=precision))
        if most >= 32:
            plans.append(plan(32, (4, 4), 8, 1, precision=precision))
        return [*plans, plan(16, (4, 4), 8, 2, precision=precision)]
    if rows > 64 and most == 64:
        plans.append(plan(128, (4, 8), 8, 1, offsets_ahead=True))
    if most == 64:
        # Masks along the channels take registers of their own.
        plans.append(plan(64, (4, 8), 8, 2, registers=None if channels % _LONG_SIDE else 128))
    if most >= 32:
        plans.append(plan(32, (4, 8), 4, 2))
    return [*plans, plan(16, (4, 4), 4, 2)]


def tiles_plans(dtype: torch.dtype, channels: int, rows: int, device: Device) -> list[AttentionPlan]:
    """Plans of the backward's first kernel, the best first.

    It holds the rows and their gradients in shared memory, each twice, since they are factors in both directions; and
    no sums.
    """
    padded = triton.cdiv(channels, 64) * 64

    def plan(rows: int, warps: int, resident: int, precision: str = "tf32") -> AttentionPlan:
        copies = {"tf32": 4, "ieee": 2, "tf32x3": 8}[precision]
        shared = copies * padded * rows * dtype.itemsize + 20_480
        return AttentionPlan(rows, _chunk(channels, 64), BACKWARD_TILE, warps, resident, shared, precision)

    most = _most_rows(channels)
    if dtype == torch.float32:
        by_parts = plan(16, 8, 1, "tf32x3")  # in a third of the time, for four times the shared memory
        fits = _has_tf32x3(device) and by_parts.shared_bytes <= device.shared_bytes
        return [by_parts if fits else plan(16, 8, 1, "ieee")]
    plans = []
    if most == 64:
        plans.append(plan(64, 8, 1))
    if most >= 32:
        plans.append(plan(32, 4, 1))
    return [*plans, plan(16, 4, 1)]


def rows_plans(dtype: torch.dtype, channels: int, rows: int, device: Device) -> list[AttentionPlan]:
    """Plans of the backward's second kernel, the best first. It holds the sums of all rows in registers."""

    def plan(rows: int, warps: int, resident: int, precision: str = "tf32") -> AttentionPlan:
        shared = 256 * rows * max(1, dtype.itemsize // 2)
        return AttentionPlan(rows, _chunk(channels, _LONG_SIDE), BACKWARD_TILE, warps, resident, shared, precision)

    most = _most_rows(channels)
    if dtype == torch.float32:
        return [plan(most, 8, 1, "tf32x3" if _has_tf32x3(device) else "ieee")]
    if rows > 64 and most == 64 and channels % _LONG_SIDE == 0:
        return [plan(128, 8, 1), plan(64, 8, 2)]
    return [plan(most, 8, 2 if most == 64 else 1)]
