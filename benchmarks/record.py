"""What every record says about where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import gcl_kernels
from gcl_kernels.backends import cpu
from gcl_kernels.dispatch import BACKENDS

RESULTS = Path(__file__).parent / "results"


def _command(*words: str) -> str:
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, and where Linux tells them family and model: a hypervisor may give no more than a
    maker's name."""
    try:
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
    except OSError:
        lines = []
    # Of the first core.
    facts = {key.strip(): value.strip() for key, value in reversed(lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    name = facts["model name"]
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def cpu_road() -> dict[str, str]:
    """Which code the ``cpu`` backend runs here; its figures differ by that as by the processor."""
    if BACKENDS["cpu"].why_unavailable() is not None:
        return {"instruction_set": "none: no extension", "products": "PyTorch's"}
    products = {
        "own": "the extension's own",
        "blas": "PyTorch's BLAS",
        "pytorch": "PyTorch's, called between the blocks",
    }
    road = cpu._cpu
    return {"instruction_set": road.instruction_set(), "products": products[road.products()]}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _changed(*sources: str) -> str:
    """``+`` where these files, named from here, have changes that are not committed."""
    status = _command("git", "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return "+" if status not in ("", "unknown") else ""


def last_change(folder: str) -> str:
    """The commit that last changed a folder, with ``+`` as in :func:`environment`."""
    return _command("git", "log", "-1", "--format=%h", "--", folder) + _changed(folder)


def environment() -> dict[str, object]:
    """Machine, versions, commit (with ``+`` where the tree had changes), the ``cpu`` backend's
    road."""
    commit = _command("git", "rev-parse", "--short", "HEAD")
    # What a record's figures depend on.
    sources = ["../gcl_kernels", "../csrc", "../build_extensions.py", "../benchmarks/*.py"]
    record: dict[str, object] = {
        "commit": commit + _changed(*sources),
        "gcl_kernels": gcl_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **cpu_road(),
    }
    if torch.cuda.is_available():
        record |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        }
    return record


def caption(machine: dict[str, object]) -> str:
    """What the figures depend on, in the words that a page quotes with them."""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, instruction set "
        f"{machine['instruction_set']}, products {machine['products']}, PyTorch "
        f"{machine['torch']}, commit {machine['commit']}."
    )
