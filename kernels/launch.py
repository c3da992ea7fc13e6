"""The launch itself: on which device, with which block sizes, compiled how often, and what happens where it is refused.

The sizes are chosen by dtype, channel count and the limits of the device, so that no call stops to tune itself.
They are chosen by counting (bytes in flight, instructions a byte, registers), not by measurement.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

_LINE_BYTES = 128  # an L1 line: what one pixel of one tile gives to a channel block
_VECTOR_BYTES = 16  # the widest load of one thread
_COST_OF_A_SHARE = 1.0  # starting a program and adding up its result, in items
INTERPRETED = triton.knobs.runtime.interpret
WARPS = 4  # of a program that works on a tile of pixels

# Triton compiles a kernel anew for a number that is 1, for multiples of 16 and for the rest, and a 1 is no tensor to
# it. These change from call to call, so every kernel takes them as they come. The names are those of the parameters.
NUMBERS = (
    "all_tiles",
    "channel_blocks",
    "channel_splits",
    "elements",
    "first_row",
    "height",
    "kernel_rows",
    "locations_batch_stride",
    "prompts",
    "prompts_of_share",
    "radius",
    "row_blocks",
    "rows",
    "splits",
    "tiles_of_share",
    "tiles_of_split",
    "width",
    "window_height",
)
# Likewise the alignment of tensors with a few bytes a prompt: slices of them begin anywhere.
SMALL = ("alpha", "alpha_partials", "expected", "logsumexp", "logsumexp_parts", "pointwise_bias")


class Device(NamedTuple):
    """What block sizes depend on."""

    multiprocessors: int
    shared_bytes: int  # shared memory that one block may have
    capability: int  # 90 for sm_90


HOPPER = Device(132, 232_448, 90)  # assumed where no device can be asked: the interpreter's
_assumed = [HOPPER]


@contextlib.contextmanager
def assuming(device: Device):
    """Choose block sizes for ``device`` where tensors lie on no GPU: to compile for it without having it."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


def device_of(tensor: Tensor) -> Device:
    """The tensor's device."""
    return _assumed[-1] if tensor.device.type != "cuda" else _cuda_device(tensor.device.index)


@lru_cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


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


def split_evenly(programs: int, items: int, resident: int, device: Device) -> tuple[int, int]:
    """Into how many shares to cut the items that each program walks over, and how many items a share has at most.

    As many as let the programs of one wave, ``resident`` on each multiprocessor, fill the device, and no more: each
    share costs a start and a result to add.
    """
    return _split_evenly(programs, items, resident * device.multiprocessors)


@lru_cache(maxsize=4096)
def _split_evenly(programs: int, items: int, at_once: int) -> tuple[int, int]:
    def time(shares: int) -> float:
        waves = -(-programs * shares // at_once)
        return waves * (-(-items // shares) + _COST_OF_A_SHARE)

    most = min(items, max(1, 2 * at_once // programs))
    items_of_share = -(-items // min(range(1, most + 1), key=time))
    return -(-items // items_of_share), items_of_share


def launch(kernel, programs: int, device: torch.device, *arguments, num_warps: int, **constants) -> None:
    """Run ``programs`` instances of a kernel on ``device``, which need not be the current one.

    Fused multiply-adds are asked for by name: Triton is about to turn them off by default.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=True)


class SmallerPlanWarning(RuntimeWarning):
    """A GPU refused a kernel's block sizes for want of resources, and smaller ones are used."""


class NoPlanFitsError(RuntimeError):
    """A GPU has not the resources for a kernel, even with its smallest block sizes."""


class Plan(Protocol):
    @property
    def shared_bytes(self) -> int: ...


P = TypeVar("P", bound=Plan)
R = TypeVar("R")
refused: set[tuple[str, torch.device, Plan]] = set()


def fitting_plans(name: str, plans: Sequence[P], tensor: Tensor) -> list[P]:
    """Those of the plans that the device of ``tensor`` has the shared memory for and has not refused.

    Raises:
        NoPlanFitsError: there is none.
    """
    device, limit = tensor.device, device_of(tensor).shared_bytes
    fitting = [plan for plan in plans if plan.shared_bytes <= limit and (name, device, plan) not in refused]
    if not fitting:
        raise NoPlanFitsError(f"{name} has no block sizes for {device}, where a block may have {limit} shared bytes")
    return fitting


def run_best(name: str, plans: Sequence[P], tensor: Tensor, run: Callable[[P], R]) -> R:
    """``run`` the first of the plans, the best first, that fits the device of ``tensor``.

    One that is refused all the same is not tried there again, and one `SmallerPlanWarning` says so. ``name`` has all
    that a refusal is for: kernel, dtype and channels.

    Raises:
        NoPlanFitsError: none fits.
    """
    fitting = fitting_plans(name, plans, tensor)
    for plan in fitting:
        try:
            return run(plan)
        except OutOfResources as error:
            refused.add((name, tensor.device, plan))
            what_now = "has no smaller blocks" if plan is fitting[-1] else "takes smaller blocks"
            warnings.warn(f"{name} {what_now} on {tensor.device}: {error}", SmallerPlanWarning, stacklevel=2)
    raise NoPlanFitsError(f"{name} has no block sizes that {tensor.device} does not refuse")
