"""What the block functions of every backend read and write.

``Problem`` names two sets of rows. Within a process they are one and the same; of two processes
that hold shards of a batch one takes its own as rows and the other's as columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gcl_kernels.blocks import Block
from gcl_kernels.spec import Bases, BoolTable, NegativesSpec

KEPT_ELEMENTS = 7 * 1024 * 1024
"""Products whose tiles may stay in memory between the passes: 28 MiB of float32, whatever the size
of the batch. Multiplying all tiles a second time is a quarter of the floating-point operations.
From 32 MiB on, glibc returns memory to the system at once: the page faults of every step then cost
more than the product where D is 256 or less, measured."""


def empty_kept(num_products: int, scale: Tensor, most: int | None = None) -> Tensor:
    """Memory for tiles that stay between the passes, where there are so many products; ``most`` of
    them, or ``KEPT_ELEMENTS``."""
    least = min if isinstance(num_products, int) else torch.sym_min
    return scale.new_empty(least(num_products, most or KEPT_ELEMENTS))


def all_kept(num_products: int) -> bool:
    """Whether so many products may all stay."""
    return num_products <= KEPT_ELEMENTS


class SampleData(NamedTuple):
    """What a call is given of each sample beside its embeddings: constants whose last dimension is
    the samples. Operators take them as a list, and they travel to other processes.

    Attributes:
        sample_ids: int64 [N], or None: all samples are different.
        log_weights: of the views' embeddings as candidates [V, N], in the accumulation dtype; -inf
            of what is no candidate. None: all zero.
        limits: the largest logit of a negative of each anchor [V, N], likewise. None: no limits.
    """

    sample_ids: Tensor | None = None
    log_weights: Tensor | None = None
    limits: Tensor | None = None

    def given(self) -> list[Tensor]:
        """Those that there are."""
        return [of for of in self if of is not None]

    def like(self, given: Sequence[Tensor]) -> SampleData:
        """Of other samples, what their :meth:`given` returned."""
        others = iter(given)
        return SampleData(*(None if of is None else next(others) for of in self))


class Extra(NamedTuple):
    """Candidates beyond the batch: negatives of its anchors, and of this process's alone.

    Attributes:
        embeddings: [K, D], as they are given; None: there are none.
        ids: int64 [K], or None: they are of no sample of the batch.
        anchor_ids: int64 [N] that ``ids`` are compared with, where these are not ``sample_ids``.
    """

    embeddings: Tensor | None = None
    ids: Tensor | None = None
    anchor_ids: Tensor | None = None


def split_data(data: Sequence[Tensor | None]) -> tuple[SampleData, Extra]:
    """What an operator has in one list, the one's fields before the other's."""
    count = len(SampleData._fields)
    return SampleData(*data[:count]), Extra(*data[count:])


class Embedded(NamedTuple):
    """What the losses' O(M D) side makes of ``B`` bases, for ``V`` views of ``N`` samples.

    Attributes:
        z: unit vectors of the bases [B, N, D] in the compute dtype, contiguous.
        inverse: ``1 / max(|e|, eps)`` of the bases [B, N], empty without ``normalize``.
        lengths: of the views [V, N], empty without ``normalize``.
        coefficients: how views are made of two bases [V, 2, N]; empty where they are given.
        dots: the bases' own-sample similarities [B, B, N]; zero where ``base_pairs`` has none.
    """

    z: Tensor
    inverse: Tensor
    lengths: Tensor
    coefficients: Tensor
    dots: Tensor

    @classmethod
    def empty(cls, bases: Sequence[Tensor], scale: Tensor, spec: NegativesSpec) -> Embedded:
        """Memory for it. ``scale`` is in the accumulation dtype."""
        num_bases, num_views, (num_samples, dim) = len(bases), len(spec.candidates), bases[0].shape
        with_lengths = num_samples if spec.normalize else 0
        return cls(
            scale.new_empty(num_bases, num_samples, dim, dtype=spec.compute_dtype),
            scale.new_empty(num_bases, with_lengths),
            scale.new_empty(num_views, with_lengths),
            scale.new_empty(num_views, 2, 0 if spec.mixed is None else num_samples),
            scale.new_empty(num_bases, num_bases, num_samples),
        )


def empty_gradients(
    bases: Sequence[Tensor], scale: Tensor, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Memory for gradients of the bases, in their dtypes; empty where none is needed.

    Args:
        needs_grad: of each base first.
    """
    return [
        base.new_empty(base.shape) if needs else scale.new_empty(0)
        for base, needs in zip(bases, needs_grad, strict=False)
    ]


@dataclass(eq=False)  # frozen it would take three times as long to make, twice a step
class Problem:
    """The inputs of a pass over views that are given.

    Attributes:
        z_rows, z_cols: embeddings [M, D] and [K, D] in the compute dtype, contiguous.
        ids_rows, ids_cols: sample ids [M], [K], contiguous, or None for the default ids, whose
            equal pairs the blocks list.
        scale: logit scale, 0-d, in the accumulation dtype.
        max_scale: its value where the host knows it: given as a number, or in a CPU's own memory.
        unit_rows: every row has length 1 or 0.
        log_weights_rows, log_weights_cols: as of :class:`SampleData`, [M] and [K], contiguous: the
            term of candidate ``q`` is ``exp(x_pq + log_weights_cols[q])``, of ``p`` for the
            column's anchor likewise. Both are None, or neither.
        limits_rows, limits_cols: likewise: where ``x_pq > limits_rows[p]``, ``q`` is no negative of
            ``p``.
    """

    z_rows: Tensor
    z_cols: Tensor
    ids_rows: Tensor | None
    ids_cols: Tensor | None
    scale: Tensor
    max_scale: float | None
    unit_rows: bool
    log_weights_rows: Tensor | None = field(default=None, kw_only=True)
    log_weights_cols: Tensor | None = field(default=None, kw_only=True)
    limits_rows: Tensor | None = field(default=None, kw_only=True)
    limits_cols: Tensor | None = field(default=None, kw_only=True)

    @property
    def one_sided(self) -> bool:
        """Whether a pair's term may be another for the row's anchor than for the column's."""
        return self.log_weights_rows is not None or self.limits_rows is not None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.z_rows.dtype

    @property
    def accum_dtype(self) -> torch.dtype:
        return self.scale.dtype


@dataclass(eq=False)
class FusedProblem(Problem):
    """The inputs of a pass over views that are linear combinations of two base embeddings.

        z_v^j = sum_b coefficients[v, b, j] z_b^j           x(v,j; w,k) = s <z_v^j, z_w^k>

    One block is over samples ``J x K``; its four products ``y_bc = <z_b^j, z_c^k>`` give the logits
    of all V x V pairs of views.

    Attributes:
        z_rows, z_cols: base embeddings [2, N, D], [2, K, D]; ids [N], [K]; log weights and limits
            [V, N], [V, K]; ``unit_rows`` speaks of the V views.
        coefficients_rows, coefficients_cols: [V, 2, N], [V, 2, K] in the accumulation dtype,
            contiguous.
        bases: for each view the base that it is (its coefficients are one and zero), or None.
        candidates: V x V, ``[v][w]``: the other samples of view w are negatives of view v.
    """

    coefficients_rows: Tensor
    coefficients_cols: Tensor
    bases: Bases
    candidates: BoolTable


MAX_BOUNDED_SCALE = 40.0
"""exp(-2 s) and exp(2 s) stay normal float32 numbers (e^-87 to e^88) with room for the sums."""


def bounded(problem: Problem) -> bool:
    """Whether ``|x| <= s`` is known on the host, and ``exp(+-2 s)`` is harmless: ``s`` may then
    stand for every maximum. Weights have no bound."""
    return is_bound(problem.max_scale, problem.unit_rows) and not problem.one_sided


def is_bound(scale: float | None, unit_rows: bool) -> bool:
    """The same of a scale and of whether every row has length 1 or 0."""
    return unit_rows and scale is not None and 0 <= scale <= MAX_BOUNDED_SCALE


@dataclass(frozen=True)
class RowStats:
    """Running statistics of rows: ``sum`` is that of exp(x - ``max``) over the logits so far.

    Both [M], or [V, N] of a :class:`FusedProblem`; of columns, K for M and N.
    """

    max: Tensor
    sum: Tensor


def line_shape(problem: Problem, z: Tensor) -> tuple[int, ...]:
    """Of what has a number for each row ``z`` of the problem, or for each column: [M], or [V, N] of
    a :class:`FusedProblem`."""
    if isinstance(problem, FusedProblem):
        return len(problem.bases), z.shape[1]
    return (z.shape[0],)


def empty_stats(problem: Problem, z: Tensor) -> RowStats:
    """The statistics without a logit of the embeddings ``z``: the problem's rows, or columns."""
    shape = line_shape(problem, z)
    # Finite, so that a row which stays without a logit subtracts no infinities.
    start = problem.max_scale if bounded(problem) else torch.finfo(problem.accum_dtype).min
    return RowStats(problem.scale.new_full(shape, start), problem.scale.new_zeros(shape))


class Lines(NamedTuple):
    """Of rows, or of columns, in a backward pass. Where both are the same so are these tensors.

    Attributes:
        lse: ``neg_lse``, :func:`subtractable`: [M], or [V, N] of a :class:`FusedProblem`.
        grad: its gradient.
        sums: what a pass adds up, in the accumulation dtype: ``H z`` [M, D], or ``R`` [2, N, D].
        inner: ``U`` [V, 2, N] of a :class:`FusedProblem`, to which its weights add; else empty.
    """

    lse: Tensor
    grad: Tensor
    sums: Tensor
    inner: Tensor


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
        joined: tiles [2, 2, P, Q] of a product's two bases a side lie as one matrix, rows of a base
            below the other's, columns beside the other's.

    Attributes:
        kept_elements: of ``kept``, those that lie in tiles: the first.
    """

    def __init__(
        self,
        device: torch.device,
        plan: Sequence[Block],
        kept: Tensor | None = None,
        leading: tuple[int, ...] = (),
        joined: bool = False,
    ) -> None:
        self._device, self._joined = device, joined
        self._beside: dict[tuple[int, int, int], Tensor] = {}
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
        if self._joined and leading == [2, 2]:
            strides = [2 * rows * pitch, pitch, 2 * pitch, 1]
        # One call where a slice, a view and a slice are three: they are what a small batch costs.
        tile = buffer.as_strided(shape, strides)
        self._tiles[slot, shape, dtype] = tile
        return tile

    def both_bases(self, z: Tensor, rows: slice, count: int) -> Tensor:
        """Rows of either base of ``z`` [2, N, D], ``count`` of them, below the other's: what a
        joined tile multiplies. Beyond the last zeros. A copy, unless these are all rows."""
        if rows.stop - rows.start == count == z.shape[1]:
            return z.flatten(0, 1)
        key = (z.data_ptr(), rows.start, count)
        if key not in self._beside:
            given = z[:, rows]
            padded = z.new_zeros(2, count, z.shape[2])
            padded[:, : given.shape[1]] = given
            self._beside[key] = padded.flatten(0, 1)
        return self._beside[key]


def _pitch(cols: int) -> int:
    return -(-cols // PITCH_MULTIPLE) * PITCH_MULTIPLE


def known_scale(scale: Tensor, max_scale: float | None) -> float | None:
    """The scale's value where the host has it without waiting for a device."""
    if max_scale is None and scale.is_cpu:
        # An operator's body runs on the CPU here: it reads an operand where it lies.
        return float(scale)
    return max_scale


def finite_scale(scale: Tensor, max_scale: float | None) -> Tensor:
    """The scale; NaN for an infinite one, whose logits of -inf would pass for candidates of weight
    zero."""
    if max_scale is not None:
        return scale
    if scale.is_cpu:
        return scale if math.isfinite(scale) else torch.full_like(scale, torch.nan)
    return torch.add(scale, scale, alpha=0)  # inf + 0 * inf


def subtractable(neg_lse: Tensor) -> Tensor:
    """``neg_lse`` with +inf for -inf: exp(x - inf) = 0, so that a row without a negative has no
    weights, whatever its masked x are."""
    return neg_lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)


def allows_tf32() -> bool:
    """Whether PyTorch lets float32 products on a GPU take TF32, by whichever of its settings
    (``torch.get_float32_matmul_precision`` raises where its newer ones were used)."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
