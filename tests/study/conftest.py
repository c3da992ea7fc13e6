"""The study's modules are scripts in a folder of their own."""

import sys
from pathlib import Path

from drawn_pictures import picture_folder

__all__ = ["picture_folder"]

STUDY = Path(__file__).resolve().parents[2] / "study"

sys.path.insert(0, str(STUDY))
