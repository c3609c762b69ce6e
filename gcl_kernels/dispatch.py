"""The table of backends: what is available, and which one serves a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gcl_kernels import embeddings, problem
from gcl_kernels.backends import cpu, cuda, reference, tiled, triton
from gcl_kernels.spec import check_choice

ENVIRONMENT_VARIABLE = "GCL_KERNELS_BACKEND"
"""Names the backend that ``backend="auto"`` stands for. An explicit argument wins over it."""


def by_blocks(*arguments: Any) -> None:
    """No pass in one call."""


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Attributes:
        module: its block functions (``reference`` has none: it is dense).
        why_unavailable: None where it can run on a device of this machine, else the reason.
        why_not: None where it serves tensors of this device and compute dtype, else the reason,
            which may be that it is not available.
        fuses_scores: it has block functions of score fusion. Without them the fused embeddings are
            formed, as a third view like any other.
        keeps_tiles: the first tiles stay in memory between the passes, see ``problem``.
        halves_diagonal: it computes both halves of a block on the diagonal, which are equal; the
            plan then cuts these blocks finer.
        product, add_product: matrix products, PyTorch's or its own.
        statistics, matrix_gradient, fused_statistics, fused_matrix_gradient: a whole pass over a
            problem in one call. None is returned where the caller loops over its blocks.
        embed, embed_backward, embed_fused, fused_gradients: the O(M D) side of its problems:
            PyTorch's, or its own.
    """

    module: ModuleType
    why_unavailable: Callable[[], str | None]
    why_not: Callable[[torch.device, torch.dtype], str | None]
    fuses_scores: bool = True
    keeps_tiles: bool = False
    halves_diagonal: bool = False
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = problem.product
    add_product: Callable[[Tensor, Tensor, Tensor], None] = problem.add_product
    statistics: Callable[..., Tensor | None] = by_blocks
    matrix_gradient: Callable[..., Tensor | None] = by_blocks
    fused_statistics: Callable[..., Tensor | None] = by_blocks
    fused_matrix_gradient: Callable[..., tuple[Tensor, Tensor] | None] = by_blocks
    embed: Callable[..., Any] = embeddings.embed
    embed_backward: Callable[..., Any] = embeddings.embed_backward
    embed_fused: Callable[..., Any] = embeddings.embed_fused
    fused_gradients: Callable[..., Any] = embeddings.fused_gradients


BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        reference, reference.why_unavailable, reference.why_not, fuses_scores=False
    ),
    "tiled": Backend(
        tiled, tiled.why_unavailable, tiled.why_not, keeps_tiles=True, halves_diagonal=True
    ),
    "cpu": Backend(
        cpu,
        cpu.why_unavailable,
        cpu.why_not,
        keeps_tiles=True,
        halves_diagonal=cpu.HALVES_DIAGONAL,
        product=cpu.product,
        add_product=cpu.add_product,
        statistics=cpu.statistics,
        matrix_gradient=cpu.matrix_gradient,
        fused_statistics=cpu.fused_statistics,
        fused_matrix_gradient=cpu.fused_matrix_gradient,
        embed=cpu.embed,
        embed_backward=cpu.embed_backward,
        embed_fused=cpu.embed_fused,
        fused_gradients=cpu.fused_gradients,
    ),
    "triton": Backend(
        triton,
        triton.why_unavailable,
        triton.why_not,
        embed=triton.embed,
        embed_backward=triton.embed_backward,
        embed_fused=triton.embed_fused,
        fused_gradients=triton.fused_gradients,
    ),
    "cuda": Backend(cuda, cuda.why_unavailable, cuda.why_not, fuses_scores=False),
}

_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""What ``auto`` tries on a type of device, in this order, before ``tiled``, which serves all."""


def backends() -> dict[str, str]:
    """Every backend's name with ``"available"`` or the reason why it is not."""
    return {name: row.why_unavailable() or "available" for name, row in BACKENDS.items()}


def check_backend(name: str, origin: str = "backend") -> None:
    """Raise ValueError unless it is ``"auto"`` or a backend's name."""
    check_choice(origin, name, ("auto", *BACKENDS))


def resolve_backend(name: str, device: torch.device, compute_dtype: torch.dtype) -> str:
    """The backend that serves a call with ``backend=name`` on this device in this dtype.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name cannot serve the call; there is no fallback.
    """
    origin = "backend"
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        origin = ENVIRONMENT_VARIABLE
    check_backend(name, origin)
    if name != "auto":
        reason = _why_not(name, device, compute_dtype)
        if reason is not None:
            raise RuntimeError(f"{origin}: {name!r} is not available: {reason}")
        return name
    for name in _PREFERENCE.get(device.type, ()):
        if _why_not(name, device, compute_dtype) is None:
            return name
    return "tiled"


def _why_not(name: str, device: torch.device, compute_dtype: torch.dtype) -> str | None:
    row = BACKENDS[name]
    reason = row.why_not(device, compute_dtype)
    return reason and (row.why_unavailable() or reason)
