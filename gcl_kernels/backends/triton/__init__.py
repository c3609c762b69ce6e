"""Triton kernels, for NVIDIA sm_80 and later and AMD gfx942 and gfx950.

This module names them, says where they cannot run, and imports Triton at their first call only.
``stats``, ``weights``, ``fused_stats`` and ``fused_weights`` hold one block function each with its
launcher, ``primitives`` what they share, ``tiles`` the tables of tile sizes; ``embeddings`` the
O(M D) side of both roads; ``launching`` calls what was compiled before.
"""

from __future__ import annotations

import importlib.util
import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.backends.base import Backend
from gcl_kernels.backends.triton.tiles import device_chip, find_chip, wave_rows

BLOCK_ROWS = 8192
"""Largest rows of a block that has weights: they take 128 MiB (256 MiB in float32), the whole
workspace, and launches are few. Smaller blocks gain nothing, since logits stay on the chip at any
size; only where the product of weights and embeddings then fills the chip, ``wave_rows``."""

FUSED_BLOCK_ROWS = 4096
"""The same for blocks over samples, whose weights are four matrices."""

STATS_BLOCK_ROWS = 32768
"""The same where there are statistics only: with tiles of 128 their slots take 128 MiB."""

FUSED_STATS_BLOCK_ROWS = 12288
"""The same for blocks over samples: 108 MiB for three views."""


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # an import hook that forbids it
        return False


# Looked up once: torch.compile traces what asks for it.
_TRITON_INSTALLED = _is_installed("triton")


def _interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU (its own switch, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_NOT_INSTALLED = "Triton is not installed: pip install triton"
_NOT_THIS_GPU = "needs an NVIDIA GPU of compute capability 8.0 or later, or an AMD gfx942 or gfx950"


def _launcher(module: str, name: str) -> Any:
    """A method: the function of a module of this folder, which is imported when first called."""

    def launch(self: Triton, *arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), name)(*arguments)

    return launch


class Triton(Backend):
    """The backend ``triton``. It would keep tiles where ``keeps_tiles`` said so: at D = 768 reading
    them is expected to cost half types nearly what multiplying again does."""

    kept_elements = 1 << 25
    block_stats = _launcher("stats", "block_stats")
    block_weights = _launcher("weights", "block_weights")
    fused_block_stats = _launcher("fused_stats", "fused_block_stats")
    fused_block_weights = _launcher("fused_weights", "fused_block_weights")
    embed = _launcher("embeddings", "embed")
    gradients = _launcher("embeddings", "gradients")
    compile_ahead = _launcher("launching", "compile_ahead")

    def why_unavailable(self) -> str | None:
        if not _TRITON_INSTALLED:
            return _NOT_INSTALLED
        if _interpreted():
            return None
        if not torch.cuda.is_available():
            return "no CUDA or ROCm device"
        if all(device_chip(index) is None for index in range(torch.cuda.device_count())):
            return _NOT_THIS_GPU
        return None

    def why_not(self, device: torch.device, compute_dtype: torch.dtype) -> str | None:
        if compute_dtype == torch.float64:
            return "no float64: use backend='tiled'"
        if not _TRITON_INSTALLED:
            return _NOT_INSTALLED
        if device.type != "cuda":
            return (
                None if _interpreted() else f"needs tensors on a CUDA or ROCm device, got {device}"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        # torch.compile warns of caches that it traces.
        chip_of_device = find_chip if torch.compiler.is_compiling() else device_chip
        return _NOT_THIS_GPU if chip_of_device(index) is None else None

    def compiles(self, device: torch.device) -> bool:
        return not _interpreted() and self.why_not(device, torch.float32) is None

    def block_rows(self, z: Tensor) -> int:
        self._check(z)
        return self._weights_rows(z, z.shape[0] * z.shape[1], BLOCK_ROWS, 256)

    def stats_block_rows(self, z: Tensor) -> int:
        self._check(z)
        return self.block_rows(z) if self.keeps_tiles else STATS_BLOCK_ROWS

    def fused_block_rows(self, z: Tensor, num_views: int) -> int:
        self._check(z)
        return self._weights_rows(z, z.shape[1], FUSED_BLOCK_ROWS, 128)

    def fused_stats_block_rows(self, z: Tensor, num_views: int) -> int:
        self._check(z)
        return self.fused_block_rows(z, num_views) if self.keeps_tiles else FUSED_STATS_BLOCK_ROWS

    def _weights_rows(self, z: Tensor, num_rows: int, most: int, tile_cols: int) -> int:
        chip = device_chip(z.get_device()) if z.is_cuda else None
        if num_rows <= most or chip is None or z.dtype == torch.float32:
            return most
        return wave_rows(chip, z.shape[-1], most, tile_cols)

    def _check(self, z: Tensor) -> None:
        reason = self.why_not(z.device, z.dtype)
        if reason is not None:
            raise RuntimeError(f"backend: 'triton' cannot serve this call: {reason}")
