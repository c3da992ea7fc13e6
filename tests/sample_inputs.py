"""Inputs of `deformable_sample` for the tests of every backend: one named case a situation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stable_sam_cuda.ops import reference

NAMES = ("features", "offsets", "identity", "alpha", "amplitude")


@dataclass(frozen=True)
class Case:
    """Sizes and form of one call; ``broadcast`` names the arguments of batch 1."""

    name: str
    batch: int = 2
    channels: int = 8
    height: int = 5
    width: int = 7
    max_offset: float = 1.0
    routed: bool = True  # with identity and alpha
    amplitude: str | None = None  # None, "pixel" or "channel"
    broadcast: frozenset[str] = field(default_factory=frozenset)
    layout: str = "channels_last"  # or "contiguous", "strided"

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain", routed=False),
    Case("routed"),
    Case("pixel_amplitude", amplitude="pixel"),
    Case("channel_amplitude", amplitude="channel"),
    Case("amplitude_without_alpha", routed=False, amplitude="channel"),
    Case("contiguous", layout="contiguous", amplitude="channel"),
    Case("strided", layout="strided", amplitude="channel"),
    Case("1x1", height=1, width=1),
    Case("one_row", height=1, width=9),
    Case("one_column", height=9, width=1),
    Case("one_channel", channels=1, amplitude="pixel"),
    Case("3_channels", channels=3, amplitude="channel"),
    Case("33_channels", channels=33, amplitude="channel"),
    Case("sam_channels", channels=256, height=12, width=10),
    Case("wide", batch=1, channels=16, height=3, width=130),
    Case("64_prompts", batch=64, channels=4, height=6, width=5, broadcast=frozenset({"features", "identity"})),
    Case("max_offset_0", max_offset=0.0),
    Case("max_offset_0.5", max_offset=0.5),
    Case("max_offset_2.7", max_offset=2.7, height=9, width=8),
    Case("max_offset_8", max_offset=8.0, height=9, width=12),
    *(
        Case(f"one_{name}", batch=3, amplitude="channel", broadcast=frozenset({name}))
        for name in ("features", "offsets", "identity", "alpha", "amplitude")
    ),
    Case("all_but_offsets", batch=3, amplitude="pixel", broadcast=frozenset(NAMES) - {"offsets"}),
    Case("all_but_alpha", batch=3, amplitude="pixel", broadcast=frozenset(NAMES) - {"alpha"}),
    Case("no_prompts", batch=0),
    Case("no_prompts_one_image", batch=0, amplitude="pixel", broadcast=frozenset({"features", "identity"})),
    Case("no_rows", height=0),
    Case("no_channels", channels=0),
]


def by_name(*names: str) -> list[Case]:
    return [case for case in CASES if case.name in names]


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
    """Random inputs of a case, whose sampling locations keep away from integers.

    At an integer location the derivative jumps, so a rounding error may pick the other side's.
    """
    generator = torch.Generator().manual_seed(seed)

    def batch_of(name: str) -> int:
        return 1 if name in case.broadcast else case.batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    image = (case.channels, case.height, case.width)
    inputs: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    inputs["features"] = normal(batch_of("features"), *image)
    inputs["offsets"] = _offsets_off_integers(
        case, lambda: 1.5 * normal(batch_of("offsets"), 2, case.height, case.width)
    )
    if case.routed:
        inputs["identity"] = normal(batch_of("identity"), *image)
        inputs["alpha"] = normal(batch_of("alpha"), 2)
    if case.amplitude is not None:
        channels = 1 if case.amplitude == "pixel" else case.channels
        inputs["amplitude"] = normal(batch_of("amplitude"), channels, case.height, case.width)
    return {name: None if t is None else with_layout(t.to(device), case.layout) for name, t in inputs.items()}


def output_batch(case: Case) -> int:
    """B of the output: every argument that is there may be the one that carries it."""
    there = {"features", "offsets"} | ({"identity", "alpha"} if case.routed else set())
    there |= {"amplitude"} if case.amplitude is not None else set()
    return case.batch if there - case.broadcast else 1


def make_grad_output(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (output_batch(case), case.channels, case.height, case.width)
    return with_layout(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype), case.layout)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other memory; "strided" is dense in no memory format."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    padded = torch.full([2 * size + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = padded[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def truth(inputs: dict[str, Tensor | None], max_offset: float, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's output and gradients in float64, for these very inputs."""
    doubles = {name: None if t is None else t.detach().double() for name, t in inputs.items()}
    return output_and_gradients(reference.deformable_sample, doubles, max_offset, grad_output.double())


def output_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor | None], max_offset: float, grad_output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call ``function(features, offsets, identity, alpha, amplitude, max_offset)`` and differentiate it in all."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    output = function(*leaves.values(), max_offset)
    there = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(output, list(there.values()), grad_output)
    return output.detach(), dict(zip(there, gradients, strict=True))


def _offsets_off_integers(case: Case, draw: Callable[[], Tensor]) -> Tensor:
    """Redraw the offsets whose location lies within 0.01 of an integer, or of the border the clamp holds it at."""
    offsets = draw()
    if case.max_offset == 0:
        return offsets
    rows = torch.arange(case.height, dtype=torch.float64)[:, None].expand(case.height, case.width)
    columns = torch.arange(case.width, dtype=torch.float64)[None, :].expand(case.height, case.width)
    for _ in range(100):
        location = torch.stack((columns, rows)) + case.max_offset * torch.tanh(offsets.double())
        near = (location - location.round()).abs() < 0.01
        if not bool(near.any()):
            return offsets
        offsets = torch.where(near, draw(), offsets)
    raise AssertionError(f"{case}: no offsets away from integers were found")
