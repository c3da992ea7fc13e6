"""Block sizes of offset_head.

The sizes are chosen by counting, with the compiler's report of registers at hand
(bench/compile_matrix.py), not by measurement. No call stops to tune itself.
"""

from typing import NamedTuple

import triton

_CHANNELS_OF_THREAD = 8  # of one pixel: one 16-byte load of a half type, two of float32
_FEWEST_CHANNELS = 16
_TILE_ROWS = 8
_MOST_GROUPS = 64
_TAPS_REGISTERS = 112  # of a thread, for sums of the gradient of the depthwise weight


class HeadPlan(NamedTuple):
    """A program works on ``groups`` groups of ``columns`` pixels that lie side by side, all channels of them."""

    channel_block: int
    tile_y: int
    tile_groups: int
    columns: int
    warps: int
    resident: int  # programs of a persistent kernel that fit on one multiprocessor at once, by their registers

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of pixels."""
        return self.tile_y, self.tile_groups * self.columns

    @property
    def constants(self) -> dict[str, int]:
        """What a launch takes beyond its arguments."""
        return {
            "CHANNEL_BLOCK": self.channel_block,
            "TILE_Y": self.tile_y,
            "TILE_GROUPS": self.tile_groups,
            "COLUMNS": self.columns,
            "num_warps": self.warps,
            "num_stages": 1,  # the loads of a row of taps are many already
        }


def _plan(channel_block: int, columns: int, warps: int, channels_of_thread: int, resident: int) -> HeadPlan:
    groups = min(max(1, 32 * warps * channels_of_thread // channel_block), _MOST_GROUPS)
    tile_y = min(groups, _TILE_ROWS)
    return HeadPlan(channel_block, tile_y, groups // tile_y, columns, warps, resident)


def _all_channels(channels: int) -> int:
    return max(_FEWEST_CHANNELS, triton.next_power_of_2(channels))


def head_plan(channels: int, columns: int = 4) -> HeadPlan:
    """Of the kernels that need all channels of a pixel at once, for its norm, or gain by having them.

    Each pixel read serves up to ``columns`` sums, each tap read as many pixels.
    """
    block = _all_channels(channels)
    warps = min(max(8, block // (32 * _CHANNELS_OF_THREAD)), 16)
    return _plan(block, columns, warps, _CHANNELS_OF_THREAD, 1)


def hidden_plan(channels: int) -> HeadPlan:
    """Of the backward's first kernel, which keeps five sums over its pixels in registers, too."""
    return head_plan(channels, columns=2)


def taps_plan(channels: int, kernel_size: int) -> HeadPlan:
    """Of the gradient of the depthwise weight: a block of channels at a time, for its sums are kept in registers.

    Threads have fewer channels, and so narrower loads, where that lets the sums of more taps be kept.
    """
    channels_of_thread = _CHANNELS_OF_THREAD if _CHANNELS_OF_THREAD * kernel_size**2 <= _TAPS_REGISTERS else 4
    return _plan(min(_all_channels(channels), 64), 4, 4, channels_of_thread, 3)


def rows_of_taps(kernel_size: int) -> int:
    """Rows of the depthwise kernel whose sums fit into the registers of one program."""
    return min(kernel_size, max(1, _TAPS_REGISTERS // (4 * kernel_size)))
