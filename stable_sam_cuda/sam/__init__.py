"""Stable-SAM on Meta's Segment Anything: building, stabilising, predicting, plugin files."""

from stable_sam_cuda.sam.automatic_masks import StableSamAutomaticMaskGenerator
from stable_sam_cuda.sam.build import load_sam
from stable_sam_cuda.sam.plugin_io import load_plugin, plugin_state_dict, save_plugin
from stable_sam_cuda.sam.predictor import StableSamPredictor
from stable_sam_cuda.sam.stabilize import plugin_of, stabilize, unstabilize

__all__ = [
    "StableSamAutomaticMaskGenerator",
    "StableSamPredictor",
    "load_plugin",
    "load_sam",
    "plugin_of",
    "plugin_state_dict",
    "save_plugin",
    "stabilize",
    "unstabilize",
]
