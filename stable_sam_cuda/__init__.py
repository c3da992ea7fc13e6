"""Stable-SAM: a plugin that keeps the Segment Anything Model accurate under imprecise prompts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stable_sam_cuda import backends
from stable_sam_cuda.backends import (
    Backend,
    BackendUnavailableError,
    MissingBackendWarning,
    UnfusedAttentionWarning,
)
from stable_sam_cuda.functional import deformable_attention, deformable_sample, offset_head
from stable_sam_cuda.modules import DeformableSampler, DynamicRouter, OffsetNetwork

if TYPE_CHECKING:
    from stable_sam_cuda.sam.automatic_masks import StableSamAutomaticMaskGenerator
    from stable_sam_cuda.sam.build import load_sam
    from stable_sam_cuda.sam.plugin_io import load_plugin, plugin_state_dict, save_plugin
    from stable_sam_cuda.sam.predictor import StableSamPredictor
    from stable_sam_cuda.sam.stabilize import plugin_of, stabilize, unstabilize

__version__ = "0.1.0"

# Imported on first use: segment_anything needs torchvision, which the operations do without.
_SAM_NAMES = frozenset(
    {
        "StableSamAutomaticMaskGenerator",
        "StableSamPredictor",
        "load_plugin",
        "load_sam",
        "plugin_of",
        "plugin_state_dict",
        "save_plugin",
        "stabilize",
        "unstabilize",
    }
)

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "DeformableSampler",
    "DynamicRouter",
    "MissingBackendWarning",
    "OffsetNetwork",
    "StableSamAutomaticMaskGenerator",
    "StableSamPredictor",
    "UnfusedAttentionWarning",
    "backends",
    "deformable_attention",
    "deformable_sample",
    "load_plugin",
    "load_sam",
    "offset_head",
    "plugin_of",
    "plugin_state_dict",
    "save_plugin",
    "stabilize",
    "unstabilize",
]


def __getattr__(name: str) -> Any:
    if name in _SAM_NAMES:
        value = getattr(import_module("stable_sam_cuda.sam"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
