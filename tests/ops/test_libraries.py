"""What is compiled and loaded, on which devices it runs, and imports without what is optional."""

import subprocess
import sys

import pytest

from stable_sam_cuda.ops import libraries


@pytest.mark.parametrize(
    ("architecture", "runs_on", "not_on"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (8, 7), (9, 0)]),
        ("8.7", [(8, 7), (8, 9)], [(8, 6)]),
        ("9.0", [(9, 0)], [(8, 9), (10, 0)]),
        ("9.0a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("8.0+PTX", [(8, 0), (8, 7), (9, 0), (12, 1)], [(7, 5)]),
        ("10.0+PTX", [(10, 0), (10, 3), (11, 0), (12, 0)], [(9, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(12, 0)]),
        ("10.0f+PTX", [(10, 3)], [(11, 0), (12, 0)]),
        ("12.0", [(12, 0), (12, 1)], [(10, 0), (11, 0)]),
    ],
)
def test_which_devices_run_an_architecture(
    architecture: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    compiled = libraries.Architecture.parse(architecture)
    assert compiled is not None
    assert [c for c in (*runs_on, *not_on) if compiled.runs_on(c)] == runs_on


def test_the_build_record_covers_both_libraries() -> None:
    built = libraries.build_info()["libraries"]
    assert set(built) == {"_ops_cpu", "_ops_cuda"}
    assert all(facts["built"] or facts["reason"] for facts in built.values())


def test_the_instruction_set_in_use_is_known() -> None:
    assert libraries.cpu_instruction_set() in libraries.build_info()["libraries"]["_ops_cpu"]["instruction_sets"]


WITHOUT_OPTIONAL_PACKAGES = """
import sys
for name in ("torchvision", "segment_anything", "triton", "cv2", "safetensors"):
    sys.modules[name] = None
import torch, stable_sam_cuda
output = stable_sam_cuda.deformable_sample(torch.ones(1, 8, 3, 3), torch.zeros(1, 2, 3, 3), max_offset=1.0)
assert output.shape == (1, 8, 3, 3)
print(stable_sam_cuda.backends.why_unavailable("triton"))
"""


def test_imports_and_runs_without_torchvision_and_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_OPTIONAL_PACKAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
