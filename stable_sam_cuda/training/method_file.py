"""Files of trained methods: Stable-SAM's plugin as `save_plugin` writes it, a baseline's weights in the same manner.

A baseline's file is safetensors with the parameters that the method trains, under their names in the SAM that
`install_method` changed. Metadata: ``format``, ``format_version``, ``base_model`` (empty where unknown), ``method``
and ``training``, the training record in JSON.
"""

import json
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import nn

from stable_sam_cuda.files import save_bytes
from stable_sam_cuda.sam.base_models import base_model_name
from stable_sam_cuda.sam.plugin_io import PLUGIN_SUFFIX, read_plugin, save_plugin
from stable_sam_cuda.sam.stabilize import stabilize
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem
from stable_sam_cuda.sam.weight_files import read_safetensors
from stable_sam_cuda.training.methods import METHODS, install_method

FORMAT = "stable_sam_cuda.method"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class MethodRecord:
    """What a file says of the method in it."""

    method: str
    base_model: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def method_file_name(method: str) -> str:
    """The file in a run's folder that holds what ``method`` trained."""
    return f"plugin{PLUGIN_SUFFIX}" if method == "stable" else f"{method}{PLUGIN_SUFFIX}"


def save_method(sam: Sam, method: str, parameters: dict[str, nn.Parameter], path: Path, /, **training: Any) -> None:
    """Write what ``method`` trained in ``sam``, whole or not at all.

    Args:
        parameters: what `install_method` returned.
        training: the training record; values that JSON can hold.

    Raises:
        ValueError: a weight is not finite.
        OSError: the file cannot be written.
    """
    if method == "stable":
        save_plugin(sam, path, **training)
        return
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    if bad := first_not_finite(tensors):
        raise ValueError(f"sam: expected finite weights, got NaN or infinity in {bad}")
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "base_model": base_model_name(sam) or ""}
    metadata |= {"method": method, "training": json.dumps(training)}
    save_bytes(path, save(tensors, metadata))


def load_method(sam: Sam, path: str | PathLike[str]) -> MethodRecord:
    """Install a trained method in a plain SAM, in place: the plugin or a baseline, whichever the file holds.

    Args:
        path: a file that `save_method` or `save_plugin` wrote; or whatever `stabilize` takes as a plugin's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another kind, of another base model, or does not fit this one.
    """
    name = fspath(path)
    tensors, metadata = read_safetensors(Path(name), "plugin") if name.endswith(PLUGIN_SUFFIX) else ({}, {})
    if metadata.get("format") != FORMAT:
        stabilize(sam, name)
        training = read_plugin(name)[1].training if name.endswith(PLUGIN_SUFFIX) else {}
        return MethodRecord("stable", base_model_name(sam), training)
    record = _record(metadata, name)
    base_model = base_model_name(sam)
    if record.base_model not in (None, base_model):
        raise ValueError(
            f"plugin: expected weights trained on {base_model or 'this model'}, got {name}, trained on "
            f"{record.base_model}"
        )
    parameters = install_method(sam, record.method)
    if problem := fit_problem(tensors, parameters):
        raise ValueError(f"plugin: {name} does not fit method {record.method} on this model: {problem}")
    if bad := first_not_finite(tensors):
        raise ValueError(f"plugin: expected finite weights, got NaN or infinity in {bad} of {name}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    return record


def _record(metadata: dict[str, str], name: str) -> MethodRecord:
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"plugin: expected format_version {FORMAT_VERSION}, got {name} of {metadata.get('format_version')}"
        )
    try:
        record = MethodRecord(metadata["method"], metadata["base_model"] or None, json.loads(metadata["training"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"plugin: expected metadata that describe a method, got {name}: {error}") from error
    if record.method not in METHODS:
        raise ValueError(f"plugin: expected one of the methods {', '.join(METHODS)}, got {record.method!r} in {name}")
    return record
