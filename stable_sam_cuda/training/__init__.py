"""Training of Stable-SAM's plugin, of the paper's baselines, and of the base model ``sam_lite``."""
