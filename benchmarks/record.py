"""What every record says about where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import gcl_kernels

RESULTS = Path(__file__).parent / "results"


def _command(*words: str) -> str:
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return models[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, object]:
    """Machine, versions and commit (with ``+`` where the tree had changes)."""
    commit = _command("git", "rev-parse", "--short", "HEAD")
    # What a record's figures depend on.
    sources = ["../gcl_kernels", "../csrc", "../build_extensions.py", "../benchmarks/*.py"]
    dirty = _command("git", "status", "--porcelain", "--untracked-files=no", "--", *sources)
    record: dict[str, object] = {
        "commit": commit + ("+" if dirty not in ("", "unknown") else ""),
        "gcl_kernels": gcl_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        record |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        }
    return record
