"""Plugin files: safetensors with the plugin's sizes, base model and training record as metadata.

Metadata (all values are strings, as safetensors has it): ``format``, ``format_version``, ``base_model`` (empty where
unknown), one entry a constructor argument of `DeformableSampler` and ``training``, both in JSON. Version 1 is for the
decoder's last block, as in the paper; version 2 is for more ``blocks``, so that readers of version 1 alone refuse it.
"""

import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.files import atomic_write
from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.sam.base_models import base_model_name
from stable_sam_cuda.sam.stable_block import stable_block_of
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem
from stable_sam_cuda.sam.weight_files import SUFFIX, read_safetensors

FORMAT = "stable_sam_cuda.plugin"
LAST_BLOCK, MORE_BLOCKS = "1", "2"  # versions of the format
PLUGIN_SUFFIX = SUFFIX
SHIPPED_PLUGINS_FOLDER = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class PluginRecord:
    """What a plugin file says of its plugin: the base model it was trained on (None: unknown) and its training."""

    base_model: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def plugin_state_dict(sam: Sam) -> dict[str, Tensor]:
    """The state of the plugin in a stabilised SAM, under the plugin's own names."""
    return stable_block_of(sam).plugin.state_dict()


def shipped_plugins() -> dict[str, Path]:
    """Name -> file of every plugin that comes with the package: ``stable_<base model>``."""
    return {path.stem: path for path in SHIPPED_PLUGINS_FOLDER.glob(f"stable_*{PLUGIN_SUFFIX}")}


def save_plugin(
    sam_or_plugin: Sam | DeformableSampler,
    path: str | PathLike[str],
    *,
    base_model: str | None = None,
    **training: Any,
) -> None:
    """Write a plugin to a safetensors file, whole or not at all.

    Args:
        sam_or_plugin: a stabilised SAM, or a plugin by itself.
        path: a file name ending in ``.safetensors``; its folder must exist.
        base_model: the model trained on, where a SAM does not tell it (see `base_model_name`).
        training: the training record; values that JSON can hold.

    Raises:
        TypeError: ``sam_or_plugin`` is neither; a value of the training record does not go into JSON.
        ValueError: the SAM is not stabilised; ``path`` ends otherwise; a weight is not finite.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != PLUGIN_SUFFIX:
        raise ValueError(f"path: expected a file name ending in {PLUGIN_SUFFIX}, got {path}")
    if isinstance(sam_or_plugin, DeformableSampler):
        sampler = sam_or_plugin
    else:
        sampler = stable_block_of(sam_or_plugin).plugin
        base_model = base_model or base_model_name(sam_or_plugin)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sampler.state_dict().items()}
    if bad := first_not_finite(tensors):
        raise ValueError(f"sam_or_plugin: expected finite weights, got NaN or infinity in {bad}")
    version = LAST_BLOCK if sampler.blocks == 1 else MORE_BLOCKS
    metadata = {"format": FORMAT, "format_version": version, "base_model": base_model or ""}
    metadata |= {name: json.dumps(value) for name, value in sampler.config().items()}
    metadata["training"] = json.dumps(training)
    content = save(tensors, metadata)
    with atomic_write(path) as file:
        file.write(content)


def load_plugin(path: str | PathLike[str]) -> DeformableSampler:
    """The plugin of a file written by `save_plugin`, in float32 on the CPU; raises as `read_plugin` does."""
    return read_plugin(path)[0]


def read_plugin(path: str | PathLike[str]) -> tuple[DeformableSampler, PluginRecord]:
    """The plugin of a file, in float32 on the CPU, and its record. No code of the file is ever run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another kind, or its weights are missing, misshapen or not finite.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path, "plugin")
    versions = (LAST_BLOCK, MORE_BLOCKS)
    if metadata.get("format") != FORMAT or metadata.get("format_version") not in versions:
        raise ValueError(
            f"plugin: expected a file of format {FORMAT} {' or '.join(versions)}, got {path} of format "
            f"{metadata.get('format', 'unknown')} {metadata.get('format_version', '')}".rstrip()
        )
    try:
        sampler = _new_sampler(metadata)
        training = json.loads(metadata["training"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"plugin: expected metadata that describe a DeformableSampler, got {path}: {error}") from error
    if problem := fit_problem(tensors, sampler.state_dict()):
        raise ValueError(f"plugin: {path} does not fit its own metadata: {problem}")
    if bad := first_not_finite(tensors):
        raise ValueError(f"plugin: expected finite weights, got NaN or infinity in {bad} of {path}")
    sampler.load_state_dict(tensors, assign=True)
    return sampler.float(), PluginRecord(metadata.get("base_model") or None, training)


def _new_sampler(metadata: dict[str, str]) -> DeformableSampler:
    """An empty sampler of the sizes in the metadata: on the meta device, so that absurd sizes cost nothing."""
    if metadata["format_version"] == LAST_BLOCK:
        metadata = metadata | {"blocks": "1"}
    with torch.device("meta"):
        names = DeformableSampler(1).config()
        return DeformableSampler(**{name: json.loads(metadata[name]) for name in names})
