"""sampled_attention: attention to calibrated features that are never written to memory, and its gradients."""

from .backward import sampled_attention_backward
from .forward import sampled_attention

__all__ = ["sampled_attention", "sampled_attention_backward"]
