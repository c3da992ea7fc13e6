"""An unfinished training of the base on its way to another machine: small enough to be carried, exact enough to go on.

Weights travel in float16, Adam's second moments in bfloat16, its first ones, the memory of some ten steps, not at all.
The averaged weights are those in sam_lite.safetensors. For 7.4 M parameters that is 30 MB instead of 119.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from pack_parts import read_parts, write_parts
from safetensors.torch import load_file, save
from torch import Tensor

from stable_sam_cuda.files import save_bytes

PIECE = 2**20
PREFIX = "module."  # of the model within torch's AveragedModel


def write_base(checkpoint: dict[str, Any], path: Path, **metadata: str) -> None:
    """The averaged weights of a training's checkpoint in float16, as `load_sam` reads them.

    A file that holds just these is left as it is: records name a base by its file's digest, and safetensors writes
    metadata in another order each time.
    """
    average = {
        name.removeprefix(PREFIX): value.half().contiguous()
        for name, value in checkpoint["average"].items()
        if name.startswith(PREFIX)
    }
    if path.is_file() and _same(load_file(path), average):
        return
    facts = {"model": "sam_lite", "variant": checkpoint["options"]["variant"], **metadata}
    save_bytes(path, save(average, metadata=facts))


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def write_handover(checkpoint: dict[str, Any], out: Path, part_bytes: int) -> None:
    """The rest of a checkpoint, beside what `write_base` writes, in parts; parts that are there are replaced."""
    moments = {
        index: {
            name: value.bfloat16() if name == "exp_avg_sq" else value
            for name, value in state.items()
            if name != "exp_avg"
        }
        for index, state in checkpoint["optimizer"]["state"].items()
    }
    buffer = BytesIO()
    torch.save(
        {
            **checkpoint,
            "model": {name: value.half() for name, value in checkpoint["model"].items()},
            "average": {"n_averaged": checkpoint["average"]["n_averaged"]},
            "optimizer": {**checkpoint["optimizer"], "state": moments},
        },
        buffer,
    )
    content = buffer.getvalue()
    pieces = [(f"{start:012d}", content[start : start + PIECE]) for start in range(0, len(content), PIECE)]
    remove_handover(out)
    write_parts(pieces, out, part_bytes)


def remove_handover(out: Path) -> None:
    """Take away the parts of an earlier call."""
    for path in out.glob("part-*"):
        path.unlink()


def read_handover(folder: Path, base: Path) -> dict[str, Any]:
    """The checkpoint that `write_handover` and `write_base` were given, to half precision.

    Raises:
        ValueError: the parts are not whole, as `read_parts` has it.
    """
    content = b"".join(piece for _, piece in sorted(read_parts(folder)))
    checkpoint = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    checkpoint["model"] = _float(checkpoint["model"])
    checkpoint["average"] |= {PREFIX + name: value for name, value in _float(load_file(base)).items()}
    for state in checkpoint["optimizer"]["state"].values():
        state["exp_avg_sq"] = state["exp_avg_sq"].float()
        state["exp_avg"] = torch.zeros_like(state["exp_avg_sq"])
    return checkpoint


def _float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in state.items()}
