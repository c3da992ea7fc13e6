"""What this machine and installation are: versions, devices, tools."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("stable_sam_cuda", "torch", "torchvision", "triton", "segment_anything", "numpy", "pillow", "safetensors")


def package_versions() -> dict[str, str | None]:
    """Python's version and that of every package that matters here; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def first_line_of(command: list[str], marker: str = "") -> str | None:
    """First line with ``marker`` in what a command prints; None where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if marker in line), None)


def build_tools() -> dict[str, str | None]:
    """nvcc and the C++ compiler, as ``path (version)``; None where one is not found."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    return {
        "nvcc": nvcc and f"{nvcc} ({first_line_of([nvcc, '--version'], 'release')})",
        "c++": compiler and f"{compiler} ({first_line_of([compiler, '--version'])})",
    }


def cuda_devices() -> list[dict[str, str | int]]:
    """Name, compute capability and memory of every CUDA device that torch sees."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30)}
        for p in properties
    ]


def machine_facts() -> dict[str, str | int | None]:
    """Platform, processor count and the threads that torch uses."""
    return {
        "platform": platform.platform(),
        "interpreter": sys.executable,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
    }
