"""The model, its weights and its plugin as options name them, looked at before anything is loaded."""

import os
from pathlib import Path

from stable_sam_cuda.cli.options import NO_PLUGIN
from stable_sam_cuda.notes import printable
from stable_sam_cuda.sam.base_models import BASE_MODELS
from stable_sam_cuda.sam.download import REMOTE_CHECKPOINTS, checkpoint_folder
from stable_sam_cuda.sam.plugin_io import PLUGIN_SUFFIX, shipped_plugins


def check_model(model: str, checkpoint: Path | None) -> None:
    """Refuse the name of a model that is not known, and a checkpoint that is no readable file.

    Raises:
        ValueError, OSError: naming the option.
    """
    if model not in BASE_MODELS:
        raise ValueError(f"--model: expected one of {', '.join(BASE_MODELS)}, got {model!r}")
    if checkpoint is None and model in REMOTE_CHECKPOINTS:
        checkpoint_folder()  # it may have to be named
    elif checkpoint is not None:
        _check_file("--checkpoint", checkpoint, "a file")


def check_plugin(model: str, plugin: str) -> None:
    """Refuse a plugin that is not there. Whether it fits the model is seen when both are loaded.

    Raises:
        ValueError, OSError: naming the option.
    """
    if plugin == NO_PLUGIN:
        return
    if plugin.endswith(PLUGIN_SUFFIX):
        _check_file("--plugin", Path(plugin), f"a {PLUGIN_SUFFIX} file")
        return
    shipped = shipped_plugins()
    if (f"stable_{model}" if plugin == "auto" else plugin) not in shipped:
        got = f"auto for --model {model}, which has none" if plugin == "auto" else repr(plugin)
        raise ValueError(
            f"--plugin: expected the path of a {PLUGIN_SUFFIX} file, a shipped plugin ({', '.join(sorted(shipped))}) "
            f"or none (plain SAM), got {got}"
        )


def _check_file(option: str, path: Path, what: str) -> None:
    if path.is_dir():
        raise ValueError(f"{option}: expected {what}, got the directory {printable(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"{option}: expected {what}, got {printable(path)}, which does not exist")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{option}: expected {what} that can be read, got {printable(path)}: permission denied")
