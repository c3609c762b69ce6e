"""What the block functions of every backend read and write, and the product they share.

``Problem`` names two sets of rows. They are one and the same here; processes that hold shards of
a batch give their own rows and another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcl_kernels.blocks import Block
from gcl_kernels.spec import HALF_DTYPES


@dataclass(frozen=True)
class Problem:
    """The inputs of a pass.

    Attributes:
        z_rows, z_cols: embeddings [M, D] in the compute dtype, contiguous.
        ids_rows, ids_cols: sample ids [M], or None for the default ids, whose equal pairs the
            blocks list.
        scale: logit scale, 0-d, in the accumulation dtype.
        max_scale: its value where the host knows it: given as a number, or in a CPU's own memory.
        unit_rows: every row has length 1 or 0.
        kept: None, or [M_rows, M_cols] in the accumulation dtype where a small problem's tiles stay
            between the passes, which saves the second product. What they hold is the backend's.
    """

    z_rows: Tensor
    z_cols: Tensor
    ids_rows: Tensor | None
    ids_cols: Tensor | None
    scale: Tensor
    max_scale: float | None
    unit_rows: bool
    kept: Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.z_rows.dtype

    @property
    def accum_dtype(self) -> torch.dtype:
        return self.scale.dtype


@dataclass(frozen=True)
class RowStats:
    """Running statistics of rows: ``sum`` is that of exp(x - ``max``) over the logits so far."""

    max: Tensor
    sum: Tensor


class Workspace:
    """Memory for tiles, allocated once per pass; a slot's next tile overwrites its last."""

    def __init__(self, device: torch.device, plan: Sequence[Block]) -> None:
        self._device = device
        self._elements = max((math.prod(block.shape) for block in plan), default=0)
        self._slots: dict[tuple[int, torch.dtype], Tensor] = {}

    def tile(self, slot: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        buffer = self._slots.get((slot, dtype))
        if buffer is None:
            buffer = torch.empty(self._elements, dtype=dtype, device=self._device)
            self._slots[slot, dtype] = buffer
        return buffer[: math.prod(shape)].view(shape)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` in ``out``'s dtype, which is float32 for half operands (CUDA only)."""
    if a.dtype in HALF_DTYPES:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out=out)


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """``accumulator += a @ b`` in the accumulator's dtype."""
    if a.dtype in HALF_DTYPES:
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator.addmm_(a, b)
