"""Fixtures that these tests share with others."""

from drawn_pictures import picture_folder, small_sam

__all__ = ["picture_folder", "small_sam"]
