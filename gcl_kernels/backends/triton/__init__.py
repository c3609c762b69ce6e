"""The block functions as Triton kernels, for NVIDIA sm_80 and later and AMD gfx942 and gfx950.

This module names them, says where they cannot run, and imports Triton at their first call only.
``stats``, ``weights``, ``fused_stats`` and ``fused_weights`` hold one kernel family each with its
launcher, ``primitives`` what they share, ``tiles`` the tables of tile sizes; ``embeddings`` and
``fused_embeddings`` the O(M D) side.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.backends.triton.tiles import device_chip, find_chip
from gcl_kernels.blocks import Block
from gcl_kernels.problem import FusedProblem, Problem, RowStats, Workspace

BLOCK_ROWS = 8192
"""Largest rows of a block: its weights take 128 MiB (256 MiB in float32), the whole workspace, and
launches are few. Smaller blocks gain nothing, since logits stay on the chip at any size."""

FUSED_BLOCK_ROWS = 4096
"""The same for blocks over samples, whose weights are four matrices."""


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


def why_unavailable() -> str | None:
    """None where it can run on a device of this machine, else the reason."""
    if not _TRITON_INSTALLED:
        return _NOT_INSTALLED
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if all(device_chip(index) is None for index in range(torch.cuda.device_count())):
        return _NOT_THIS_GPU
    return None


def why_not(device: torch.device, compute_dtype: torch.dtype) -> str | None:
    """None where it serves tensors on this device with this compute dtype, else the reason."""
    if compute_dtype == torch.float64:
        return "no float64: use backend='tiled'"
    if not _TRITON_INSTALLED:
        return _NOT_INSTALLED
    if device.type != "cuda":
        return None if _interpreted() else f"needs tensors on a CUDA or ROCm device, got {device}"
    index = torch.cuda.current_device() if device.index is None else device.index
    # torch.compile warns of caches that it traces.
    chip_of_device = find_chip if torch.compiler.is_compiling() else device_chip
    return _NOT_THIS_GPU if chip_of_device(index) is None else None


def block_rows(z: Tensor) -> int:
    """The largest number of rows of a block of these embeddings."""
    _check(z)
    return BLOCK_ROWS


def fused_block_rows(z: Tensor, num_views: int) -> int:
    """The largest number of samples of a block's side, for views made of these bases."""
    _check(z)
    return FUSED_BLOCK_ROWS


def _check(z: Tensor) -> None:
    reason = why_not(z.device, z.dtype)
    if reason is not None:
        raise RuntimeError(f"backend: 'triton' cannot serve this call: {reason}")


def block_stats(
    problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block into the running statistics of its rows and columns (``cols`` is ``rows``'
    own object where the problem is square)."""
    from gcl_kernels.backends.triton import stats

    stats.block_stats(problem, block, rows, cols)


def block_weights(
    problem: Problem,
    block: Block,
    lse_rows: Tensor,
    lse_cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    workspace: Workspace,
) -> Tensor:
    """``H`` of one block, in the compute dtype, valid until the next call with this workspace.

    ``lse_*`` hold +inf for rows without a negative: every weight in them is then zero.
    """
    from gcl_kernels.backends.triton import weights

    return weights.block_weights(
        problem, block, lse_rows, lse_cols, grad_rows, grad_cols, workspace
    )


def fused_block_stats(
    problem: FusedProblem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block over samples into the running statistics [V, N] of its rows and columns."""
    from gcl_kernels.backends.triton import fused_stats

    fused_stats.fused_block_stats(problem, block, rows, cols)


def fused_block_weights(
    problem: FusedProblem,
    block: Block,
    lse_rows: Tensor,
    lse_cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    inner_rows: Tensor,
    inner_cols: Tensor,
    workspace: Workspace,
) -> Tensor:
    """``F`` [2, 2, rows, columns] of one block over samples, in the compute dtype, valid until the
    next call with this workspace; what its weights project is added to ``inner_*`` [V, 2, N]."""
    from gcl_kernels.backends.triton import fused_weights

    return fused_weights.fused_block_weights(
        problem, block, lse_rows, lse_cols, grad_rows, grad_cols, inner_rows, inner_cols, workspace
    )


def embed(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.embed`."""
    from gcl_kernels.backends.triton import embeddings

    return embeddings.embed(*arguments)


def embed_backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    """As :func:`gcl_kernels.embeddings.embed_backward`."""
    from gcl_kernels.backends.triton import embeddings

    return embeddings.embed_backward(*arguments)


def embed_fused(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.embed_fused`."""
    from gcl_kernels.backends.triton import fused_embeddings

    return fused_embeddings.embed_fused(*arguments)


def fused_gradients(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.fused_gradients`."""
    from gcl_kernels.backends.triton import fused_embeddings

    return fused_embeddings.fused_gradients(*arguments)
