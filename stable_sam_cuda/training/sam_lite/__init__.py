"""Training of the base model ``sam_lite``, with good prompts only: ``python -m stable_sam_cuda.training.sam_lite``."""
