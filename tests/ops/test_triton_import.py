"""What cannot be imported is said by its name: Triton, its kernels, or what they import."""

import subprocess
import sys

IMPORT = """
import stable_sam_cuda
from stable_sam_cuda.ops import libraries
print(libraries.triton_interprets(), libraries.why_missing("triton"))
"""


def run_after(preparation: str) -> subprocess.CompletedProcess[str]:
    """Import the package after ``preparation``, in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", preparation + IMPORT], capture_output=True, text=True)


def test_the_absence_of_triton_is_explained() -> None:
    done = run_after("import sys; sys.modules['triton'] = None")
    assert done.stdout.startswith("False Triton could not be imported: ModuleNotFoundError"), done.stderr


def test_a_checkout_without_the_package_installed_says_so() -> None:
    done = run_after("import sys; sys.modules['stable_sam_cuda.kernels'] = None")
    assert done.stdout.startswith("False Triton's kernels are not installed: a checkout has them in kernels/"), (
        done.stderr
    )


def test_a_triton_that_does_not_fit_is_named_with_its_version() -> None:
    done = run_after("import triton; triton.__version__ = '1.2.3'; del triton.knobs")
    assert done.stdout.startswith("False Triton 1.2.3 does not fit the kernels: AttributeError: "), done.stderr


def test_a_module_missing_from_the_kernels_is_an_error() -> None:
    done = run_after("import sys; sys.modules['stable_sam_cuda.kernels.location'] = None")
    assert done.returncode == 1 and "stable_sam_cuda.kernels.location" in done.stderr.strip().splitlines()[-1]
