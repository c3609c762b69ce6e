"""What the block functions of every backend read and write, and the product they share.

``Problem`` names two sets of rows. Within a process they are one and the same; of two processes
that hold shards of a batch one takes its own as rows and the other's as columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcl_kernels.blocks import Block
from gcl_kernels.spec import HALF_DTYPES, BoolTable

KEPT_ELEMENTS = 7 * 1024 * 1024
"""Products whose tiles may stay in memory between the passes: 28 MiB of float32, whatever the size
of the batch. Multiplying all tiles a second time is a quarter of the floating-point operations.
From 32 MiB on, glibc returns memory to the system at once: the page faults of every step then cost
more than the product where D is 256 or less, measured."""


def empty_kept(num_products: int, scale: Tensor) -> Tensor:
    """Memory for tiles that stay between the passes, where there are so many products."""
    return scale.new_empty(torch.sym_min(num_products, KEPT_ELEMENTS))


@dataclass(frozen=True)
class Problem:
    """The inputs of a pass.

    Attributes:
        z_rows, z_cols: embeddings [M, D] and [K, D] in the compute dtype, contiguous.
        ids_rows, ids_cols: sample ids [M], [K], contiguous, or None for the default ids, whose
            equal pairs the blocks list.
        scale: logit scale, 0-d, in the accumulation dtype.
        max_scale: its value where the host knows it: given as a number, or in a CPU's own memory.
        unit_rows: every row has length 1 or 0.
    """

    z_rows: Tensor
    z_cols: Tensor
    ids_rows: Tensor | None
    ids_cols: Tensor | None
    scale: Tensor
    max_scale: float | None
    unit_rows: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.z_rows.dtype

    @property
    def accum_dtype(self) -> torch.dtype:
        return self.scale.dtype


@dataclass(frozen=True)
class FusedProblem:
    """The inputs of a pass over views that are linear combinations of two base embeddings.

        z_v^j = sum_b coefficients[v, b, j] z_b^j           x(v,j; w,k) = s <z_v^j, z_w^k>

    One block is over samples ``J x K``; its four products ``y_bc = <z_b^j, z_c^k>`` give the logits
    of all V x V pairs of views.

    Attributes:
        z_rows, z_cols: base embeddings [2, N, D], [2, K, D] in the compute dtype, contiguous.
        coefficients_rows, coefficients_cols: [V, 2, N], [V, 2, K] in the accumulation dtype,
            contiguous.
        bases: for each view the base that it is (its coefficients are one and zero), or None.
        candidates: V x V, ``[v][w]``: the other samples of view w are negatives of view v.
        ids_rows, ids_cols: sample ids [N], [K], contiguous, or None for the default ids.
        scale, max_scale, unit_rows: as in :class:`Problem`; ``unit_rows`` speaks of the V views.
    """

    z_rows: Tensor
    z_cols: Tensor
    coefficients_rows: Tensor
    coefficients_cols: Tensor
    bases: tuple[int | None, ...]
    candidates: BoolTable
    ids_rows: Tensor | None
    ids_cols: Tensor | None
    scale: Tensor
    max_scale: float | None
    unit_rows: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.z_rows.dtype

    @property
    def accum_dtype(self) -> torch.dtype:
        return self.scale.dtype


MAX_BOUNDED_SCALE = 40.0
"""exp(-2 s) and exp(2 s) stay normal float32 numbers (e^-87 to e^88) with room for the sums."""


def bounded(problem: Problem | FusedProblem) -> bool:
    """Whether ``|x| <= s`` is known on the host, and ``exp(+-2 s)`` is harmless: ``s`` may then
    stand for every maximum."""
    scale = problem.max_scale
    return problem.unit_rows and scale is not None and 0 <= scale <= MAX_BOUNDED_SCALE


@dataclass(frozen=True)
class RowStats:
    """Running statistics of rows: ``sum`` is that of exp(x - ``max``) over the logits so far.

    Both [M], or [V, N] of a :class:`FusedProblem`; of columns, K for M and N.
    """

    max: Tensor
    sum: Tensor


def empty_stats(problem: Problem | FusedProblem, z: Tensor) -> RowStats:
    """The statistics without a logit of the embeddings ``z``: the problem's rows, or columns."""
    if isinstance(problem, FusedProblem):
        shape: tuple[int, ...] = (len(problem.bases), z.shape[1])
    else:
        shape = (z.shape[0],)
    # Finite, so that a row which stays without a logit subtracts no infinities.
    start = problem.max_scale if bounded(problem) else torch.finfo(problem.accum_dtype).min
    return RowStats(problem.scale.new_full(shape, start), problem.scale.new_zeros(shape))


PITCH_MULTIPLE = 16
"""Rows of a tile start at multiples of this many elements, 32 bytes of a half type: vector stores
and cuBLAS want aligned rows, and the last block's width may be any number."""


class Workspace:
    """Memory for tiles, allocated once per pass; a slot's next tile overwrites its last.

    Args:
        device: of the tiles.
        plan: the blocks that the pass visits.
        kept: memory of any size that outlives the pass, in the accumulation dtype, or None. The
            tiles of the first blocks lie in it, as many as fit; what they hold is the backend's.
        leading: dimensions of a kept tile before its block's two.

    Attributes:
        kept_elements: of ``kept``, those that lie in tiles: the first.
    """

    def __init__(
        self,
        device: torch.device,
        plan: Sequence[Block],
        kept: Tensor | None = None,
        leading: tuple[int, ...] = (),
    ) -> None:
        self._device = device
        self._plan = plan
        self._slots: dict[tuple[int, torch.dtype], Tensor] = {}
        self._tiles: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}
        self._kept: dict[Block, Tensor] = {}
        self.kept_elements = 0
        if kept is None:
            return
        for block in plan:
            shape = (*leading, *block.shape)
            start, end = self.kept_elements, self.kept_elements + math.prod(shape)
            if end > kept.numel():
                break
            self._kept[block], self.kept_elements = kept[start:end].view(shape), end

    def kept(self, block: Block) -> Tensor | None:
        """The block's tile that stays between the passes, or None."""
        return self._kept.get(block)

    def tile(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tile of this shape, a block's after any leading dimensions, rows aligned."""
        known = self._tiles.get((slot, shape, dtype))
        if known is not None:
            return known
        *leading, rows, cols = shape
        count, pitch = math.prod(leading), _pitch(cols)
        buffer = self._slots.get((slot, dtype))
        if buffer is None:
            most = max(b.shape[0] * _pitch(b.shape[1]) for b in self._plan)
            buffer = torch.empty(count * most, dtype=dtype, device=self._device)
            self._slots[slot, dtype] = buffer
        strides, size = [pitch, 1], rows * pitch
        for length in reversed(leading):
            strides, size = [size, *strides], size * length
        # One call where a slice, a view and a slice are three: they are what a small batch costs.
        tile = buffer.as_strided(shape, strides)
        self._tiles[slot, shape, dtype] = tile
        return tile


def _pitch(cols: int) -> int:
    return -(-cols // PITCH_MULTIPLE) * PITCH_MULTIPLE


def neg_lse_by_blocks(
    block_stats: Callable[..., None],
    problem: Problem | FusedProblem,
    plan: Sequence[Block],
    kept: Tensor,
    leading: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """``neg_lse`` of all rows and of all columns (one tensor where they are the same), from a
    backend's statistics of the plan's blocks. The tiles that fit into ``kept`` are there, zeros in
    the rest."""
    workspace = Workspace(problem.z_rows.device, plan, kept, leading)
    rows = cols = empty_stats(problem, problem.z_rows)
    if problem.z_cols is not problem.z_rows:
        cols = empty_stats(problem, problem.z_cols)
    for block in plan:
        block_stats(problem, block, rows, cols, workspace)
    kept[workspace.kept_elements :].zero_()  # an operator's result must not be left to chance
    of_rows = rows.sum.log_().add_(rows.max)
    return of_rows, of_rows if cols is rows else cols.sum.log_().add_(cols.max)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` in ``out``'s dtype, which is float32 for half operands (CUDA only)."""
    if a.dtype in HALF_DTYPES:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out=out)


def allows_tf32() -> bool:
    """Whether PyTorch lets float32 products on a GPU take TF32, by whichever of its settings
    (``torch.get_float32_matmul_precision`` raises where its newer ones were used)."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """``accumulator += a @ b`` in the accumulator's dtype."""
    if a.dtype in HALF_DTYPES:
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator.addmm_(a, b)


def fused_products(
    problem: FusedProblem,
    block: Block,
    workspace: Workspace,
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """``y_bc = <z_b^j, z_c^k>`` of a block over samples: [2, 2, P, Q], in its kept tile or in
    workspace slot 0."""
    y = workspace.kept(block)
    if y is None:
        y = workspace.tile(0, (2, 2, *block.shape), problem.accum_dtype)
    for b in range(2):
        for c in range(2):
            if block.diagonal and b > c:
                y[b, c].copy_(y[c, b].t())
            else:
                product(problem.z_rows[b, block.rows], problem.z_cols[c, block.cols].t(), y[b, c])
    return y
