"""The protocol of a road, and the loop over blocks, which knows nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gcl_kernels.blocks import Block, most_elements, plan_blocks, plan_rectangle
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.distributed import Meeting, PerSample
from gcl_kernels.problem import (
    Embedded,
    Lines,
    Problem,
    RowStats,
    SampleData,
    Workspace,
    empty_kept,
    empty_stats,
)
from gcl_kernels.spec import BoolTable, NegativesSpec

Plan = tuple[Block, ...]
Sides = tuple[Lines, Lines]
"""Of rows and of columns: one where the problem is square."""


class Road(ABC):
    """One call's embeddings, as its passes see them.

    Args:
        needs_grad: of each base, of ``mixing``, of the scale: which gradients a backward pass will
            be asked for. Both passes are told the same.

    Attributes:
        tiles: leading dimensions of a kept tile, before its block's two.
        geometry: what :func:`plan_blocks` asks: samples, candidates, and whether blocks end with
            their view.
    """

    tiles: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        spec: NegativesSpec,
        needs_grad: Sequence[bool],
        embedded: Embedded,
        data: SampleData,
    ) -> None:
        self.spec, self.backend, self.needs_grad = spec, BACKENDS[spec.backend], needs_grad
        *self.needs_bases, _, self.needs_scale = needs_grad
        self.embedded, self.data = embedded, data
        self.geometry = self._geometry()

    @abstractmethod
    def _geometry(self) -> tuple[int, BoolTable, bool]: ...

    @abstractmethod
    def _block_rows(self, stats: bool) -> int:
        """The largest rows of a block of either pass."""

    @abstractmethod
    def problem(self, scale: Tensor) -> Problem:
        """The square problem."""

    @abstractmethod
    def against(self, problem: Problem, given: Sequence[Tensor]) -> Problem:
        """Its rows, against what other processes' :meth:`shard` gave."""

    @abstractmethod
    def new_sums(self, z: Tensor, once: bool = False) -> tuple[Tensor, Tensor]:
        """``sums`` and ``inner`` of :class:`Lines`, zeros, of a problem's rows or columns ``z``;
        uninitialised where they are written ``once``."""

    def lines(self, lse: Tensor, grad: Tensor, sums: Tensor, inner: Tensor) -> Lines:
        """From ``lse`` and ``grad`` [V, N]."""
        return Lines(lse, grad, sums, inner)

    def once(self, plan: Plan) -> bool:
        """Whether one block of all rows writes every sum: nothing to start from and to add to."""
        return False

    @abstractmethod
    def add_stats(
        self, problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
    ) -> None:
        """Fold one block into the running statistics."""

    @abstractmethod
    def add_block(
        self, problem: Problem, block: Block, sides: Sides, workspace: Workspace, once: bool
    ) -> Tensor | None:
        """Add one block's gradient to both sides' ``sums`` and ``inner``, or write it (``once``).

        Returns:
            The share of ``dL/ds`` that half of ``<z, H z>`` leaves out, if any.
        """

    def weight_unit(self, problem: Problem, grad: Tensor) -> Tensor | None:
        """The unit in which weights made from ``grad`` are stored; None: 1.

        Weights are about 1 / M^2; below 6e-8 float16 has no numbers. At most 2 * 2^10 is far below
        its largest.
        """
        if problem.compute_dtype != torch.float16:
            return None
        unit = grad.abs().amax().mul_(2**-10)
        return torch.where(unit > 0, unit, 1.0)

    @property
    def needs_views(self) -> Sequence[bool]:
        """For each view, whether any gradient that is needed comes from it."""
        return self.needs_bases

    @property
    def reads_views(self) -> Sequence[bool]:
        """For each view, whether the backend's gradients count ``<z, H z>`` of it towards the
        scale's."""
        return self.needs_bases

    @abstractmethod
    def all_views(self) -> Tensor:
        """The views' unit vectors [V * N, D] in the compute dtype, contiguous."""

    @abstractmethod
    def add_views(self, part: Tensor, sums: Tensor, inner: Tensor) -> None:
        """Add ``part`` of the views' ``H z`` [V, N, D] to ``sums`` [B, N, D] and ``inner``."""

    def plan(self, stats: bool = False) -> Plan:
        """The blocks of the square problem, in a pass that makes weights or only ``stats``."""
        num_samples, candidates, per_view = self.geometry
        block_rows = self._block_rows(stats)
        halves = self.backend.halves_diagonal
        return plan_blocks(num_samples, candidates, block_rows, per_view, halves)

    def shard(self) -> list[PerSample]:
        """What other processes need of these samples."""
        of_samples = [self.embedded.coefficients] if self.spec.mixed is not None else []
        of_samples += self.data.given()
        return [
            PerSample(self.embedded.z, 1),
            *(PerSample(of.contiguous(), of.dim() - 1) for of in of_samples),
        ]

    def _add_lines(self, problem: Problem, data: SampleData, *sides: str) -> None:
        """Give its ``"rows"`` or ``"cols"`` what they have of these samples beside ids."""
        if data.log_weights is None and data.limits is None:
            return
        for side in sides:
            for name in ("log_weights", "limits"):
                setattr(problem, f"{name}_{side}", self._lines(getattr(data, name)))

    @abstractmethod
    def _lines(self, of_views: Tensor | None) -> Tensor | None:
        """A table [V, N] as a problem has it, contiguous."""

    def rectangle(
        self, problem: Problem, meeting: Meeting, given: Sequence[Tensor], stats: bool = False
    ) -> tuple[Problem, Plan]:
        """The problem's rows against what other processes gave of theirs, and its blocks."""
        _, candidates, per_view = self.geometry
        block_rows = self._block_rows(stats)
        plan = plan_rectangle(meeting.rows, meeting.cols, candidates, block_rows, per_view)
        return self.against(problem, given), plan

    def empty_kept(self, scale: Tensor) -> Tensor:
        """Memory for the tiles that stay between the passes."""
        if not (self.backend.keeps_tiles and any(self.needs_grad)):
            return scale.new_empty(0)
        num_samples, candidates, per_view = self.geometry
        most = most_elements(num_samples, candidates, self._block_rows(False), per_view)
        return empty_kept(math.prod(self.tiles) * most, scale, self.backend.kept_elements)

    def statistics(
        self, problem: Problem, plan: Plan, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``neg_lse`` of all rows and of all columns (one tensor where they are the same). The
        tiles that fit into ``kept`` are there, zeros in the rest."""
        workspace = Workspace(problem.z_rows.device, plan, kept, self.tiles)
        rows = cols = empty_stats(problem, problem.z_rows)
        if problem.z_cols is not problem.z_rows:
            cols = empty_stats(problem, problem.z_cols)
        for block in plan:
            self.add_stats(problem, block, rows, cols, workspace)
        if kept is not None:
            # An operator's result must not be left to chance.
            kept[workspace.kept_elements :].zero_()
        of_rows = rows.sum.log_().add_(rows.max)
        return of_rows, of_rows if cols is rows else cols.sum.log_().add_(cols.max)

    def gradient(
        self, problem: Problem, plan: Plan, kept: Tensor | None, sides: Sides, once: bool = False
    ) -> Tensor | None:
        """Add all blocks' gradients, as :meth:`add_block`."""
        joined = self.backend.joins_bases
        workspace = Workspace(problem.z_rows.device, plan, kept, self.tiles, joined)
        share = None
        for block in plan:
            share = add_share(share, self.add_block(problem, block, sides, workspace, once))
        return share


def multiply_(unit: Tensor | None, *sums: Tensor | None) -> None:
    """By :meth:`Road.weight_unit`, what weights stored in it were added to."""
    for of in sums:
        if unit is not None and of is not None:
            of.mul_(unit)


def add_share(share: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of what :meth:`Road.add_block` and :meth:`Road.gradient` return."""
    if share is None or part is None:
        return part if share is None else share
    return share + part
