"""The geometry of the block loop: which blocks of the similarity matrix are visited, and how.

Rows and columns are numbered view-major, ``p = view * N + sample``. The matrix of logits is
symmetric, so only blocks on and above the diagonal are visited; each serves the anchors of its
rows and of its columns. With the default ids (the sample's number), two embeddings are of one
sample where ``p - q`` is a multiple of ``N``: whole diagonals of a block, found here once.

Of the rectangle between a process's own embeddings and others' all blocks are visited; no two
embeddings in it are of one sample, unless given ids say so.

Pure integer arithmetic: no tensors, no device.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from gcl_kernels.spec import BoolTable

ROW_MULTIPLE = 16
"""Blocks are cut at multiples of this many rows, so that all but the last tile are aligned."""


@dataclass(frozen=True)
class Block:
    """One visited block.

    Attributes:
        row_start, row_stop, col_start, col_stop: its place in the matrix.
        serves_rows: its columns are candidates of its rows' anchors.
        serves_cols: its rows are candidates of its columns' anchors.
        diagonal: rows and columns are the same range: the share of the columns is that of the rows,
            transposed.
        same_sample_offsets: diagonals ``j - i`` of the block whose two embeddings are of one
            sample under the default ids.
    """

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int
    serves_rows: bool
    serves_cols: bool
    diagonal: bool
    same_sample_offsets: tuple[int, ...]

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_stop)

    @property
    def cols(self) -> slice:
        return slice(self.col_start, self.col_stop)

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_stop - self.row_start, self.col_stop - self.col_start

    def covers(self, num_rows: int) -> bool:
        """Whether its rows and columns are all the rows there are."""
        rows, cols = self.shape
        return (rows if self.diagonal else rows + cols) == num_rows

    @property
    def id_diagonals(self) -> tuple[int, int]:
        """``(id_offset, id_period)`` such that ``j - i = id_offset (mod id_period)`` holds in the
        block exactly on its ``same_sample_offsets``: what a kernel takes instead of the list."""
        rows, cols = self.shape
        offsets = self.same_sample_offsets
        if not offsets:
            # j - i is at most cols - 1 and at least 1 - rows = cols + 1 - id_period.
            return cols, rows + cols
        period = offsets[1] - offsets[0] if len(offsets) > 1 else rows + cols
        return offsets[0] % period, period


def _same_sample_offsets(
    row_start: int, row_stop: int, col_start: int, col_stop: int, num_samples: int
) -> tuple[int, ...]:
    # Entry (i, i + o) holds p - q = row_start - col_start - o, a multiple of N.
    first = -(row_stop - row_start) + 1
    last = col_stop - col_start - 1
    shift = (row_start - col_start) % num_samples
    start = first + (shift - first) % num_samples
    return tuple(range(start, last + 1, num_samples))


def _cut(start: int, stop: int, block_rows: int) -> list[tuple[int, int]]:
    """Ranges of at most ``block_rows`` rows, of nearly equal length."""
    count = -(-(stop - start) // block_rows)
    size = -(-(stop - start) // count)
    size = min(block_rows, -(-size // ROW_MULTIPLE) * ROW_MULTIPLE)
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def _halves(start: int, stop: int) -> list[tuple[int, int]]:
    half = (stop - start) / (2 * ROW_MULTIPLE)
    return _cut(start, stop, math.ceil(half) * ROW_MULTIPLE)


@dataclass(frozen=True)
class Samples:
    """Those from ``start`` to ``stop`` of ``total`` samples."""

    start: int
    stop: int
    total: int


def _spans_views(candidates: BoolTable, per_view: bool) -> bool:
    # Fewer, larger blocks for small batches.
    return all(all(row) for row in candidates) and not per_view


def _cuts(
    side: Samples, candidates: BoolTable, block_rows: int, per_view: bool
) -> list[tuple[int, list[tuple[int, int]]]]:
    """Ranges of rows of each view of these samples; or, as of view 0, of all views together."""
    num_views, total = len(candidates), side.total
    segments = [(v, v * total + side.start, v * total + side.stop) for v in range(num_views)]
    if _spans_views(candidates, per_view) and side.stop - side.start == total:
        segments = [(0, 0, num_views * total)]
    return [(v, _cut(start, stop, block_rows)) for v, start, stop in segments]


def most_elements(
    num_samples: int, candidates: BoolTable, block_rows: int, per_view: bool = False
) -> int:
    """At least as many elements as the blocks of :func:`plan_blocks` have, and few more, without
    counting them: ``num_samples`` may be symbolic."""
    count = _known_most_elements if isinstance(num_samples, int) else _most_elements
    return count(num_samples, candidates, block_rows, per_view)


def _most_elements(num_samples: int, candidates: BoolTable, block_rows: int, per_view: bool) -> int:
    def on_and_above_diagonal(rows: int) -> int:
        # Half of the square, and half of the blocks on its diagonal.
        return rows * (rows + torch.sym_min(rows, block_rows)) // 2

    views = range(len(candidates))
    if _spans_views(candidates, per_view):
        return on_and_above_diagonal(len(views) * num_samples)
    return sum(
        on_and_above_diagonal(num_samples) if a == m else num_samples**2
        for a in views
        for m in views[a:]
        if candidates[a][m] or candidates[m][a]
    )


_known_most_elements = lru_cache(maxsize=256)(_most_elements)


@lru_cache(maxsize=256)
def plan_blocks(
    num_samples: int,
    candidates: BoolTable,
    block_rows: int,
    per_view: bool = False,
    halve_diagonal: int = 0,
) -> tuple[Block, ...]:
    """The blocks to visit, in the order in which their results are accumulated.

    Args:
        num_samples: N.
        candidates: V x V; a pair of views of which neither is the other's candidate is skipped.
        block_rows: the largest number of rows, and of columns, of a block.
        per_view: cut at view boundaries even where every view is every other's candidate.
        halve_diagonal: if not 0, cut blocks on the diagonal into two of half the side and the one
            between them, where there are several, or one of at least this many rows: for backends
            that compute both equal halves of a block on the diagonal, a quarter of its product
            less.
    """
    blocks = []

    def visit(rows: tuple[int, int], cols: tuple[int, int], a: int, m: int) -> None:
        offsets = _same_sample_offsets(*rows, *cols, num_samples)
        serves = candidates[a][m], candidates[m][a]
        blocks.append(Block(*rows, *cols, *serves, rows == cols, offsets))

    cuts = _cuts(Samples(0, num_samples, num_samples), candidates, block_rows, per_view)
    for index, (a, row_cuts) in enumerate(cuts):
        for i, rows in enumerate(row_cuts):
            for m, col_cuts in cuts[index:]:
                if not (candidates[a][m] or candidates[m][a]):
                    continue
                for cols in col_cuts[i if m == a else 0 :]:
                    pairs = [(rows, cols)]
                    enough = len(row_cuts) > 1 or rows[1] - rows[0] >= halve_diagonal
                    if rows == cols and halve_diagonal and enough:
                        pairs = list(itertools.combinations_with_replacement(_halves(*rows), 2))
                    for pair in pairs:
                        visit(*pair, a, m)
    return tuple(blocks)


@lru_cache(maxsize=256)
def plan_rectangle(
    rows: Samples,
    cols: Samples,
    candidates: BoolTable,
    block_rows: int,
    per_view: bool = False,
) -> tuple[Block, ...]:
    """The blocks between some samples and others of which none is among them, in order; the
    arguments are those of :func:`plan_blocks`."""
    if rows.start == rows.stop or cols.start == cols.stop:
        return ()
    of_rows, of_cols = (_cuts(side, candidates, block_rows, per_view) for side in (rows, cols))
    return tuple(
        Block(*row, *col, candidates[a][m], candidates[m][a], False, ())
        for a, row_cuts in of_rows
        for row in row_cuts
        for m, col_cuts in of_cols
        if candidates[a][m] or candidates[m][a]
        for col in col_cuts
    )


@lru_cache(maxsize=256)
def plan_extra(
    num_samples: int,
    anchors: tuple[bool, ...],
    num_extra: int,
    block_rows: int,
    per_view: bool = False,
) -> tuple[Block, ...]:
    """The blocks between all views' rows and extra candidates, which serve the rows' anchors.

    Args:
        anchors: for each view, whether its rows meet them.
        num_extra: columns.
        per_view: cut at view boundaries even where all views meet them.
    """
    segments = [
        (v * num_samples, (v + 1) * num_samples) for v, meets in enumerate(anchors) if meets
    ]
    if all(anchors) and not per_view:
        segments = [(0, len(anchors) * num_samples)]
    return tuple(
        Block(*rows, *cols, True, False, False, ())
        for segment in segments
        for rows in _cut(*segment, block_rows)
        for cols in _cut(0, num_extra, block_rows)
    )
