"""Pictures of what the models do. Needs Pillow and numpy only."""

from .overlay import draw_box, draw_mask, draw_points
from .panel import Panel, compare
from .sampling import draw_sampling_points, sampling_points

__all__ = ["Panel", "compare", "draw_box", "draw_mask", "draw_points", "draw_sampling_points", "sampling_points"]
