"""Scripts import each other by their bare names, and the tests import them: one name must mean one file."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "study", "tests")  # of which a process of the tests has several on its path


def test_no_two_scripts_have_the_same_name() -> None:
    names = Counter(path.stem for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= {"conftest"}
