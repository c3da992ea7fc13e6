"""Plugin files: safetensors with the plugin's sizes, base model and training record as metadata.

Metadata (all values are strings, as safetensors has it): ``format``, ``format_version``, ``base_model`` (empty where
unknown), one entry a constructor argument of `DeformableSampler` and ``training``, both in JSON. Version 1 holds one
sampler, the paper's plugin; version 2 several, for as many of the decoder's last blocks: ``samplers`` is their number,
and each tensor's name begins with its sampler's place, ``0.`` being the earliest block's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.sam.atomic_file import atomic_write
from stable_sam_cuda.sam.base_models import base_model_name
from stable_sam_cuda.sam.stable_block import stable_block_of, stable_blocks_of
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem

FORMAT = "stable_sam_cuda.plugin"
ONE_SAMPLER, SEVERAL_SAMPLERS = "1", "2"  # versions of the format
MOST_SAMPLERS = 64  # that a file may claim
PLUGIN_SUFFIX = ".safetensors"
SHIPPED_PLUGINS_FOLDER = Path(__file__).parents[1] / "weights"

Samplers = tuple[DeformableSampler, ...]  # of the decoder's last blocks, in their order


@dataclass(frozen=True)
class PluginRecord:
    """What a plugin file says of its plugin: the base model it was trained on (None: unknown) and its training."""

    base_model: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def plugin_state_dict(sam: Sam) -> dict[str, Tensor]:
    """The state of the plugin in a stabilised SAM, under the names that its file has."""
    stable_block_of(sam)
    return _state([block.plugin for block in stable_blocks_of(sam)])


def as_samplers(plugin: DeformableSampler | Sequence[DeformableSampler]) -> Samplers:
    """A sampler, or several for as many blocks, which must be alike in their sizes, as a tuple.

    Raises:
        TypeError: something in the sequence is no sampler.
        ValueError: the sequence is empty, has one sampler twice, or their sizes differ.
    """
    samplers = (plugin,) if isinstance(plugin, DeformableSampler) else tuple(plugin)
    if not samplers:
        raise ValueError("plugin: expected at least one DeformableSampler, got an empty sequence")
    for sampler in samplers:
        if not isinstance(sampler, DeformableSampler):
            raise TypeError(f"plugin: expected DeformableSamplers, got {type(sampler).__name__} among them")
        if sampler.config() != samplers[0].config():
            raise ValueError(
                f"plugin: expected samplers alike in all sizes, got {samplers[0].config()} and {sampler.config()}"
            )
    if len({id(sampler) for sampler in samplers}) < len(samplers):
        raise ValueError("plugin: expected a sampler of its own for each block, got one of them twice")
    return samplers


def _state(samplers: Sequence[DeformableSampler]) -> dict[str, Tensor]:
    if len(samplers) == 1:
        return samplers[0].state_dict()
    return {
        f"{place}.{name}": tensor
        for place, sampler in enumerate(samplers)
        for name, tensor in sampler.state_dict().items()
    }


def shipped_plugins() -> dict[str, Path]:
    """Name -> file of every plugin that comes with the package: ``stable_<base model>``."""
    return {path.stem: path for path in SHIPPED_PLUGINS_FOLDER.glob(f"stable_*{PLUGIN_SUFFIX}")}


def save_plugin(
    sam_or_plugin: Sam | DeformableSampler | Sequence[DeformableSampler],
    path: str | PathLike[str],
    *,
    base_model: str | None = None,
    **training: Any,
) -> None:
    """Write a plugin to a safetensors file, whole or not at all.

    Args:
        sam_or_plugin: a stabilised SAM, or a plugin by itself: a sampler, or several for as many blocks.
        path: a file name ending in ``.safetensors``; its folder must exist.
        base_model: the model trained on, where a SAM does not tell it (see `base_model_name`).
        training: the training record; values that JSON can hold.

    Raises:
        TypeError: ``sam_or_plugin`` is neither; a value of the training record does not go into JSON.
        ValueError: the SAM is not stabilised; ``path`` ends otherwise; a weight is not finite; samplers differ in size.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != PLUGIN_SUFFIX:
        raise ValueError(f"path: expected a file name ending in {PLUGIN_SUFFIX}, got {path}")
    if isinstance(sam_or_plugin, (DeformableSampler, Sequence)):
        samplers = as_samplers(sam_or_plugin)
    else:
        stable_block_of(sam_or_plugin)
        samplers = as_samplers([block.plugin for block in stable_blocks_of(sam_or_plugin)])
        base_model = base_model or base_model_name(sam_or_plugin)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(samplers).items()}
    if bad := first_not_finite(tensors):
        raise ValueError(f"sam_or_plugin: expected finite weights, got NaN or infinity in {bad}")
    version = ONE_SAMPLER if len(samplers) == 1 else SEVERAL_SAMPLERS
    metadata = {"format": FORMAT, "format_version": version, "base_model": base_model or ""}
    metadata |= {"samplers": json.dumps(len(samplers))} if version == SEVERAL_SAMPLERS else {}
    metadata |= {name: json.dumps(value) for name, value in samplers[0].config().items()}
    metadata["training"] = json.dumps(training)
    content = save(tensors, metadata)
    with atomic_write(path) as file:
        file.write(content)


def load_plugin(path: str | PathLike[str]) -> DeformableSampler:
    """The plugin of a file written by `save_plugin`, in float32 on the CPU.

    Raises:
        ValueError: the file holds samplers of several blocks; and as `read_plugin` does.
    """
    samplers = load_samplers(path)
    if len(samplers) > 1:
        raise ValueError(
            f"plugin: expected a file with one sampler, got {path} with {len(samplers)} (load_samplers(path) has all)"
        )
    return samplers[0]


def load_samplers(path: str | PathLike[str]) -> Samplers:
    """The samplers of a file written by `save_plugin`, one a block, in float32 on the CPU; raises as `read_plugin`."""
    return read_plugin(path)[0]


def read_plugin(path: str | PathLike[str]) -> tuple[Samplers, PluginRecord]:
    """The plugin of a file, in float32 on the CPU, and its record. No code of the file is ever run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another kind, or its weights are missing, misshapen or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"plugin: expected a {PLUGIN_SUFFIX} file, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"plugin: expected a whole {PLUGIN_SUFFIX} file, got {path}: {error}") from error
    versions = (ONE_SAMPLER, SEVERAL_SAMPLERS)
    if metadata.get("format") != FORMAT or metadata.get("format_version") not in versions:
        raise ValueError(
            f"plugin: expected a file of format {FORMAT} {' or '.join(versions)}, got {path} of format "
            f"{metadata.get('format', 'unknown')} {metadata.get('format_version', '')}".rstrip()
        )
    try:
        samplers = _new_samplers(metadata)
        training = json.loads(metadata["training"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"plugin: expected metadata that describe a DeformableSampler, got {path}: {error}") from error
    if problem := fit_problem(tensors, _state(samplers)):
        raise ValueError(f"plugin: {path} does not fit its own metadata: {problem}")
    if bad := first_not_finite(tensors):
        raise ValueError(f"plugin: expected finite weights, got NaN or infinity in {bad} of {path}")
    for place, sampler in enumerate(samplers):
        prefix = "" if len(samplers) == 1 else f"{place}."
        sampler.load_state_dict({name: tensors[prefix + name] for name in sampler.state_dict()}, assign=True)
        sampler.float()
    return samplers, PluginRecord(metadata.get("base_model") or None, training)


def _new_samplers(metadata: dict[str, str]) -> Samplers:
    """Empty samplers of the sizes in the metadata: on the meta device, so that absurd sizes cost nothing."""
    count = 1 if metadata["format_version"] == ONE_SAMPLER else json.loads(metadata["samplers"])
    if count not in range(1, MOST_SAMPLERS + 1):
        raise ValueError(f"samplers: expected 1 to {MOST_SAMPLERS}, got {count!r}")
    with torch.device("meta"):
        names = DeformableSampler(1).config()
        sizes = {name: json.loads(metadata[name]) for name in names}
        return tuple(DeformableSampler(**sizes) for _ in range(count))
