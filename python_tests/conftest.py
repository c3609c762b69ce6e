"""Every backend on every device that this machine has, and tilings that leave ragged edges."""

from __future__ import annotations

import os

# torch.use_deterministic_algorithms asks this of cuBLAS, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from calls import cut_small, emulate_half_products
from interpreter import mended_interpreter

from gcl_kernels.dispatch import BACKENDS

__all__ = ["mended_interpreter"]  # a fixture of every test

LONGEST = (
    "triton_compile", "cuda_build", "trainers", "compile", "cuda_host", "open_clip", "distributed",
    "autograd", "retrieval", "demo",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of workers that take files in turn none is left with a long one."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


AVAILABLE = [name for name, row in BACKENDS.items() if row.why_unavailable() is None]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    reason = BACKENDS[request.param].why_not(device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def float64_backend(backend: str, device: torch.device) -> str:
    """A backend that computes in float64."""
    reason = BACKENDS[backend].why_not(device, torch.float64)
    if reason is not None:
        pytest.skip(reason)
    return backend


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, see there."""
    cut_small(monkeypatch)


@pytest.fixture
def emulated_half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half operands on a CPU, see there."""
    emulate_half_products(monkeypatch)


@pytest.fixture(params=["views", "fused"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of ``contract``. What a backend without block functions of score fusion does is the same for
    all, and ``tiled`` is in place of it."""
    if request.param == "formed":
        if "backend" in request.fixturenames and request.getfixturevalue("backend") != "tiled":
            pytest.skip("on tiled")
        monkeypatch.setattr(BACKENDS["tiled"], "fuses_scores", False)
    return request.param


@pytest.fixture(params=["whole", "ragged"])
def tiling(request: pytest.FixtureRequest) -> str:
    """The shipped block sizes, which hold a small problem whole, and :func:`ragged` ones.

    Backends whose tiles are smaller than their blocks are ragged either way, and have tests of
    several blocks of their own.
    """
    if request.param == "ragged":
        if "backend" in request.fixturenames:
            if request.getfixturevalue("backend") not in ("tiled", "cpu"):
                pytest.skip("its blocks are not patched")
        request.getfixturevalue("ragged")
    return request.param
