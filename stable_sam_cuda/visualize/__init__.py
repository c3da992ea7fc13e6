"""Pictures of what the models do. Needs Pillow and numpy only."""

from stable_sam_cuda.visualize.id_map import draw_id_map
from stable_sam_cuda.visualize.overlay import draw_box, draw_mask, draw_points
from stable_sam_cuda.visualize.panel import Panel, compare
from stable_sam_cuda.visualize.sampling import draw_sampling_points, sampling_points

__all__ = [
    "Panel",
    "compare",
    "draw_box",
    "draw_id_map",
    "draw_mask",
    "draw_points",
    "draw_sampling_points",
    "sampling_points",
]
