"""Every backend and device that this machine has, and tilings that leave ragged edges."""

from __future__ import annotations

import os

# torch.use_deterministic_algorithms asks this of cuBLAS, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import gcl_kernels
from gcl_kernels.backends import tiled

BACKENDS = [name for name, state in gcl_kernels.backends().items() if state == "available"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 16 rows, recomputed in the backward pass: many tiles from few samples."""
    monkeypatch.setattr(tiled, "BLOCK_ROWS", {"default": 16})
    monkeypatch.setattr(tiled, "KEPT_ELEMENTS", 0)


@pytest.fixture(params=["whole", "ragged"])
def tiling(request: pytest.FixtureRequest) -> str:
    """The shipped block sizes, which hold a small problem whole, and :func:`ragged` ones."""
    if request.param == "ragged":
        request.getfixturevalue("ragged")
    return request.param
