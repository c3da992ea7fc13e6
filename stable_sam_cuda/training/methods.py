"""What is trained, by name: Stable-SAM's plugin, and the paper's baselines on the same prompts; and their files.

Each method freezes SAM but for its own parameters. All but FT-SAM leave the image encoder alone, so that they
work from cached image embeddings.

A plugin's file is as `save_plugin` writes it. A baseline's is safetensors with the parameters that the method trains,
under their names in the SAM that `install_method` changed. Metadata: ``format``, ``format_version``, ``base_model``
(empty where unknown), ``method`` and ``training``, the training record in JSON.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import Tensor, nn

from stable_sam_cuda.files import save_bytes
from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.sam.base_models import base_model_name
from stable_sam_cuda.sam.plugin_io import PLUGIN_SUFFIX, read_plugin, save_plugin
from stable_sam_cuda.sam.stabilize import stabilize
from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem
from stable_sam_cuda.sam.weight_files import read_safetensors

FORMAT = "stable_sam_cuda.method"
FORMAT_VERSION = "1"
LORA_RANK = 4
ADAPTER_HIDDEN = 16


def _stable(sam: Sam, plugin: DeformableSampler | None) -> None:
    """Stable-SAM: DSP and DRP in the last two-way block, or in both, as the plugin says."""
    stabilize(sam, plugin)


def _prompt_token(sam: Sam, plugin: DeformableSampler | None) -> None:
    """PT-SAM: the output token of the single mask and its hypernetwork."""
    sam.mask_decoder.mask_tokens.requires_grad_(True)
    sam.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(True)


def _decoder(sam: Sam, plugin: DeformableSampler | None) -> None:
    """DT-SAM: the whole mask decoder."""
    sam.mask_decoder.requires_grad_(True)


def _whole(sam: Sam, plugin: DeformableSampler | None) -> None:
    """FT-SAM: all of SAM, image encoder and prompt encoder included."""
    sam.requires_grad_(True)


def _lora(sam: Sam, plugin: DeformableSampler | None) -> None:
    """Low-rank updates of the decoder's query and value projections (the paper leaves rank and place open)."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(config, sam.mask_decoder)


class Adapter(nn.Module):
    """A residual bottleneck behind ``inner``; the identity at initialisation."""

    def __init__(self, inner: nn.Module, channels: int, hidden: int) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(channels, hidden)
        self.up = nn.Linear(hidden, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return inner + self.up(torch.nn.functional.gelu(self.down(inner)))


def _adapter(sam: Sam, plugin: DeformableSampler | None) -> None:
    """An adapter behind the MLP of each two-way block (the paper leaves size and place open)."""
    for block in sam.mask_decoder.transformer.layers:
        block.mlp = Adapter(block.mlp, sam.mask_decoder.transformer_dim, ADAPTER_HIDDEN)
        block.mlp.down.requires_grad_(True)
        block.mlp.up.requires_grad_(True)


METHODS: dict[str, Callable[[Sam, DeformableSampler | None], None]] = {
    "stable": _stable,
    "pt": _prompt_token,
    "dt": _decoder,
    "ft": _whole,
    "lora": _lora,
    "adapter": _adapter,
}
ENCODER_METHODS = ("ft",)  # they train the image encoder, and need it in every step


def check_method(method: str) -> None:
    """
    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")


def install_method(sam: Sam, method: str, plugin: DeformableSampler | None = None) -> dict[str, nn.Parameter]:
    """Freeze ``sam`` in place, add what ``method`` trains, and return it by name.

    Args:
        plugin: for ``stable``, the untrained plugin, where it is to differ from the default one.

    Raises:
        ValueError: the method is unknown, or a plugin is given to a baseline.
    """
    check_method(method)
    if plugin is not None and method != "stable":
        raise ValueError(f"plugin: expected None with method {method!r}, got a DeformableSampler")
    sam.requires_grad_(False)
    METHODS[method](sam, plugin)
    sam.to(sam.device)  # what was added was made on the CPU
    return {name: parameter for name, parameter in sam.named_parameters() if parameter.requires_grad}


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
