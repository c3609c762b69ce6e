"""The block functions for a CPU in C++ (SIMD).

Definitions as in ``tiled``. One call computes a block's statistics or weights in one pass over the
tile while it lies in the cache, and one call makes unit vectors or their gradients. A whole pass
over the blocks is one call, too: matrix products are those of PyTorch's BLAS, whose functions the
extension is given, or its own where those are faster and for bfloat16, to which weights are rounded
as they are multiplied. The extension ``gcl_kernels._cpu`` (``csrc/cpu``) takes addresses, so that
it serves every PyTorch; what it computes itself does not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.backends.base import Backend
from gcl_kernels.blocks import Block, plan_blocks
from gcl_kernels.problem import (
    Embedded,
    FusedProblem,
    Lines,
    Problem,
    RowStats,
    SampleData,
    Workspace,
    all_kept,
    bounded,
    empty_gradients,
    is_bound,
    line_shape,
)
from gcl_kernels.spec import ABSENT, NORM_EPS, Bases, BoolTable, LossSpec, NegativesSpec, Pairs

_WHY_UNAVAILABLE: str | None = None
_cpu: Any = None
try:
    _cpu = import_module("gcl_kernels._cpu")
except ImportError as error:  # not built: an installation goes on without it
    _WHY_UNAVAILABLE = (
        f"its extension is not built ({error}): install gcl_kernels where a C++ compiler is found, "
        "see docs/building.md"
    )


def _find_blas() -> tuple[int, int] | None:
    """Addresses of ``sgemm_`` and ``dgemm_`` of the BLAS that PyTorch links, its ``mm`` calls them
    too; None where it shows none."""
    if sys.platform == "darwin":
        name = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.dylib")
    else:
        name = "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
        functions = library.sgemm_, library.dgemm_
    except (OSError, AttributeError):
        return None
    single, twice = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return (single, twice) if single and twice else None


if _cpu is not None and (_blas := _find_blas()) is not None:
    _cpu.set_blas(*_blas)

BLOCK_ROWS = 768
"""Here 512 took 3 % longer, 1024 as long, measured."""

FUSED_BLOCK_ROWS = 768
"""Samples of a block's side in score fusion. 512 took 2 % longer, 1024 as long, measured."""

HALVED_ROWS = 192
"""Of a block on the diagonal that is alone."""

ONE_CALL_ELEMENTS = 2_500_000
"""Most numbers of embeddings, their gradients and tiles for which a loss is one call. Its memory is
one piece, new each time: with three views (D = 512) the call took 0.89 of the passes' time at N =
256, 0.96 to 1.05 at 512, 1.04 to 1.20 at 1024, measured."""

_SUFFIX = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


@cache
def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(_cpu, f"{name}_{_SUFFIX[dtype]}")


def _place(block: Block) -> Any:
    """Where a block lies and whom it serves, as the extension reads it."""
    return _cpu.BlockPlace(
        block.row_start,
        block.row_stop - block.row_start,
        block.col_start,
        block.col_stop - block.col_start,
        block.serves_rows,
        block.serves_cols,
        block.diagonal,
        block.same_sample_offsets,
    )


@lru_cache(maxsize=32)
def _places(plan: tuple[Block, ...]) -> list[Any]:
    return [_place(block) for block in plan]


def _is_aligned(tensor: Tensor) -> bool:
    """False of some memory that is not PyTorch's own, such as a file's behind a header: the
    extension reads whole numbers."""
    return tensor.data_ptr() % tensor.element_size() == 0


def _readable(tensor: Tensor) -> Tensor:
    """The caller's tensor, contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor if _is_aligned(tensor) else tensor.clone()


def _reads(embeddings: Tensor, dtype: torch.dtype) -> bool:
    """Whether the extension reads embeddings of this dtype where they lie."""
    return embeddings.dtype == dtype and embeddings.stride(1) == 1 and _is_aligned(embeddings)


def _constants(problem: Problem) -> list[Tensor | None]:
    """Explicit ids, log weights and limits, of rows and columns each; they must outlive the call
    that takes their addresses."""
    sides = [(problem.ids_rows, problem.ids_cols)]
    if problem.one_sided:  # the extension has either both options or none
        for of, neutral in (
            ((problem.log_weights_rows, problem.log_weights_cols), 0.0),
            ((problem.limits_rows, problem.limits_cols), math.inf),
        ):
            sides.append(of if of[0] is not None else _neutral(problem, neutral))
    else:
        sides += [(None, None)] * 2
    return [None if of is None else _readable(of) for side in sides for of in side]


def _neutral(problem: Problem, value: float) -> tuple[Tensor, Tensor]:
    """Of rows and columns, lines of this value."""
    rows, cols = (line_shape(problem, z) for z in (problem.z_rows, problem.z_cols))
    return problem.scale.new_full(rows, value), problem.scale.new_full(cols, value)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _layout(matrix: Tensor) -> tuple[int, bool]:
    """The distance of its rows; or, where it lies by columns, of those, and true."""
    if matrix.stride(1) == 1:
        return matrix.stride(0), False
    return matrix.stride(1), True


def _by_pytorch(compute_dtype: torch.dtype) -> bool:
    """Whether products are calls of PyTorch from Python, as no other ones are at hand."""
    return compute_dtype != torch.bfloat16 and _cpu.products() == "pytorch"


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    _function("product" if a.dtype == b.dtype else "rounded_product", b.dtype)(
        torch.get_num_threads(),
        *a.shape,
        b.shape[1],
        a.data_ptr(),
        *_layout(a),
        b.data_ptr(),
        *_layout(b),
        out.data_ptr(),
        out.stride(0),
        add,
    )


def _views(bases: Bases, pairs: Iterable[tuple[int, int]]) -> Any:
    """Which view is which base, and a table of pairs of views, as the extension reads them."""
    return _cpu.Views([-1 if base is None else base for base in bases], list(pairs))


@lru_cache(maxsize=256)
def _candidates(bases: Bases, candidates: BoolTable) -> Any:
    views = range(len(bases))
    return _views(bases, ((v, w) for v in views for w in views if candidates[v][w]))


@lru_cache(maxsize=256)
def _own_pairs(bases: Bases, own_pairs: Pairs) -> Any:
    return _views(bases, (pair for v, w in own_pairs for pair in ((v, w), (w, v))))


@lru_cache(maxsize=256)
def _terms(spec: LossSpec) -> Any:
    """As the extension reads them."""
    compete = spec.other_positives == "compete" and spec.num_views > 2
    keeps_self = spec.self_similarity == "keep"
    return _cpu.Terms(spec.pair_weights, spec.candidates, keeps_self, compete)


@lru_cache(maxsize=256)
def _whole_plan(
    num_samples: int,
    candidates: BoolTable,
    fused: bool,
    block_rows: int,
    per_view: bool,
    halves_diagonal: int,
) -> tuple[list[Any], int]:
    """The blocks of a square problem, and how many elements their tiles have."""
    table: BoolTable = ((True,),) if fused else candidates
    plan = plan_blocks(num_samples, table, block_rows, per_view, halves_diagonal)
    tiles = 4 if fused else 1
    return _places(plan), tiles * sum(math.prod(block.shape) for block in plan)


def _problem(problem: Problem, constants: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """As the extension's ``Problem``, from it and its :func:`_constants`."""
    ids_rows, ids_cols, *lines = map(_address, constants)
    fused: tuple[Any, int, int] = (None, 0, 0)
    if isinstance(problem, FusedProblem):
        k_rows, k_cols = problem.coefficients_rows, problem.coefficients_cols
        views = _candidates(problem.bases, problem.candidates)
        fused = (views, k_rows.data_ptr(), k_cols.data_ptr())
    z, max_scale = problem.z_rows, problem.max_scale
    *_, rows, dim = z.shape
    return (
        torch.get_num_threads(),
        float(problem.scale) if max_scale is None else max_scale,
        bounded(problem),
        ids_rows,
        ids_cols,
        z.data_ptr(),
        rows,
        rows if problem.z_cols is z else problem.z_cols.shape[-2],
        dim,
        *fused,
        *lines,
    )


def _samples(embedded: Embedded, scale: Tensor, spec: NegativesSpec) -> tuple[Any, ...]:
    """As the extension's ``Embedded``."""
    return (
        torch.get_num_threads(),
        _own_pairs(spec.bases, spec.own_pairs),
        *embedded.z.shape,
        spec.normalize,
        NORM_EPS,
        float(scale),
        *[table.data_ptr() for table in embedded],
    )


class Cpu(Backend):
    """The backend ``cpu``."""

    makes_losses = True
    keeps_tiles = True
    # BLAS computes both equal halves of a block on the diagonal, the extension's product one.
    halves_diagonal = HALVED_ROWS if _cpu is None or _cpu.products() != "own" else 0
    multiplies_bfloat16 = _cpu is not None and _cpu.half_instruction() != "none"

    def why_unavailable(self) -> str | None:
        return _WHY_UNAVAILABLE

    def why_not(self, device: torch.device, compute_dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it serves tensors on the CPU, not on {device.type}"
        if compute_dtype == torch.bfloat16 and not self.multiplies_bfloat16:
            return _WHY_UNAVAILABLE or "this processor has no product of bfloat16"
        if compute_dtype not in _SUFFIX:
            return f"it computes in float32, float64 and bfloat16, not in {compute_dtype}"
        return _WHY_UNAVAILABLE

    def half_dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) if device.type == "cpu" and self.multiplies_bfloat16 else ()

    def block_rows(self, z: Tensor) -> int:
        return BLOCK_ROWS

    def fused_block_rows(self, z: Tensor, num_views: int) -> int:
        return FUSED_BLOCK_ROWS

    def write_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if _by_pytorch(b.dtype):
            super().write_product(out, a, b)
        else:
            _multiply(a, b, out, add=False)

    def add_product(self, accumulator: Tensor, a: Tensor, b: Tensor) -> None:
        if _by_pytorch(b.dtype):
            super().add_product(accumulator, a, b)
        else:
            _multiply(a, b, accumulator, add=True)

    def _products(self, problem: Problem, block: Block, workspace: Workspace) -> Tensor:
        if isinstance(problem, FusedProblem):
            return self.fused_products(problem, block, workspace)
        tile = workspace.kept(block)
        if tile is None:
            tile = workspace.tile(0, block.shape, problem.accum_dtype)
        self.write_product(tile, problem.z_rows[block.rows], problem.z_cols[block.cols].t())
        return tile

    def block_stats(
        self, problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
    ) -> None:
        tile, constants = self._products(problem, block, workspace), _constants(problem)
        _function("block_stats", problem.accum_dtype)(
            _problem(problem, constants),
            _place(block),
            tile.data_ptr(),
            tile.stride(-2),
            rows.max.data_ptr(),
            rows.sum.data_ptr(),
            cols.max.data_ptr(),
            cols.sum.data_ptr(),
        )

    def block_weights(
        self, problem: Problem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
    ) -> Tensor:
        tile, constants = workspace.kept(block), _constants(problem)
        if tile is None:
            tile = self._products(problem, block, workspace)
        # May be the tile's own place: what is read of it is read before that is written. Rounded to
        # the compute dtype as it is multiplied.
        out = workspace.tile(0, tile.shape, problem.accum_dtype)
        grad_rows, grad_cols = _readable(rows.grad), _readable(cols.grad)
        _function("block_weights", problem.accum_dtype)(
            _problem(problem, constants),
            _place(block),
            tile.data_ptr(),
            tile.stride(-2),
            rows.lse.data_ptr(),
            grad_rows.data_ptr(),
            rows.inner.data_ptr(),
            cols.lse.data_ptr(),
            grad_cols.data_ptr(),
            cols.inner.data_ptr(),
            out.data_ptr(),
            out.stride(-2),
        )
        return out

    # A problem says which of both roads it is of.
    fused_block_stats = block_stats
    fused_block_weights = block_weights

    def statistics(self, problem: Problem, plan: tuple[Block, ...], kept: Tensor) -> Tensor | None:
        if _by_pytorch(problem.compute_dtype):
            return None
        constants = _constants(problem)
        neg_lse = problem.scale.new_empty(line_shape(problem, problem.z_rows))
        _function("statistics", problem.compute_dtype)(
            _problem(problem, constants),
            _places(plan),
            kept.data_ptr(),
            kept.numel(),
            neg_lse.data_ptr(),
        )
        return neg_lse

    def matrix_gradient(
        self,
        problem: Problem,
        plan: tuple[Block, ...],
        kept: Tensor,
        neg_lse: Tensor,
        grad: Tensor,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor, Tensor] | None:
        *needs_bases, _, needs_scale = needs_grad
        # Of given views that are frozen the scale's gradient has shares that are not in <z, H z>.
        frozen = not isinstance(problem, FusedProblem) and not all(needs_bases)
        if _by_pytorch(problem.compute_dtype) or (needs_scale and frozen):
            return None
        constants, grad = _constants(problem), _readable(grad)
        sums = torch.empty_like(problem.z_rows, dtype=problem.accum_dtype)
        if isinstance(problem, FusedProblem):
            inner = torch.zeros_like(problem.coefficients_rows)
        else:
            inner = sums.new_empty(0)
        _function("matrix_gradient", problem.compute_dtype)(
            _problem(problem, constants),
            _places(plan),
            kept.data_ptr(),
            kept.numel(),
            neg_lse.data_ptr(),
            grad.data_ptr(),
            needs_bases,
            sums.data_ptr(),
            inner.data_ptr(),
        )
        return sums, inner

    def loss(
        self,
        bases: Sequence[Tensor],
        mixing: Tensor | None,
        scale: Tensor,
        data: SampleData,
        spec: NegativesSpec,
        terms: LossSpec,
        needs_grad: Sequence[bool],
    ) -> list[Tensor] | None:
        *needs_bases, needs_mixing, needs_scale = needs_grad
        num_samples, dim = bases[0].shape
        frozen = mixing is None and not all(needs_bases)
        sizes = BLOCK_ROWS if mixing is None else FUSED_BLOCK_ROWS, frozen, self.halves_diagonal
        if _by_pytorch(spec.compute_dtype) or spec.group or frozen and needs_scale:
            return None
        ids = data.sample_ids
        if len(data.given()) > (ids is not None):  # something that the extension does not know
            return None
        plan, elements = _whole_plan(num_samples, spec.candidates, mixing is not None, *sizes)
        if not all_kept(elements) or len(spec.candidates) > _cpu.max_views:
            return None
        if 2 * len(bases) * num_samples * dim + elements > ONE_CALL_ELEMENTS:
            return None
        # A gradient is rounded to its embeddings' dtype once it is multiplied by its upstream.
        dtype = scale.dtype
        bases = [base if _reads(base, dtype) else _readable(base.to(dtype)) for base in bases]
        threads, new = torch.get_num_threads(), scale.new_empty
        value = float(scale) if spec.max_scale is None else spec.max_scale
        value = value if math.isfinite(value) else math.nan
        if ids is not None:
            ids = _readable(ids if mixing is not None else ids.repeat(len(bases)))
        fused = None if mixing is None else _candidates(spec.bases, spec.candidates)
        rows = num_samples if mixing is not None else num_samples * len(bases)
        grads = empty_gradients(bases, scale, needs_bases)
        loss, grad_scale = new(()), new(())
        mixing = None if mixing is None else _readable(mixing)
        grad_mixing = new(len(spec.candidates), 2) if needs_mixing else new(0)
        bound = is_bound(value, spec.normalize)
        own, id_address = _own_pairs(spec.bases, spec.own_pairs), _address(ids)
        of_samples = (len(bases), num_samples, dim, spec.normalize, NORM_EPS, value)
        _function("loss", spec.compute_dtype)(
            (threads, own, *of_samples, 0, 0, 0, 0, 0),
            (threads, value, bound, id_address, id_address, 0, rows, rows, dim, fused, *[0] * 6),
            plan,
            elements,
            _terms(terms),
            num_samples if terms.reduction == "mean" else 1,
            [base.data_ptr() for base in bases],
            [base.stride(0) for base in bases],
            _address(mixing),
            ABSENT,
            needs_bases,
            loss.data_ptr(),
            [grad.data_ptr() for grad in grads],
            grad_mixing.data_ptr(),
            grad_scale.data_ptr(),
        )
        return [loss, *grads, grad_mixing, grad_scale]

    def embed(
        self, bases: Sequence[Tensor], mixing: Tensor | None, scale: Tensor, spec: NegativesSpec
    ) -> tuple[Embedded, Tensor]:
        num_views = len(spec.candidates)
        if (
            spec.compute_dtype != spec.accum_dtype
            or num_views > _cpu.max_views
            or not all(_reads(base, spec.compute_dtype) for base in bases)
        ):
            return super().embed(bases, mixing, scale, spec)
        embedded = Embedded.empty(bases, scale, spec)
        own_logits = scale.new_empty(num_views, num_views, bases[0].shape[0])
        mixing = None if mixing is None else _readable(mixing)
        _function("embed", scale.dtype)(
            _samples(embedded, scale, spec),
            [base.data_ptr() for base in bases],
            [base.stride(0) for base in bases],
            _address(mixing),
            ABSENT,
            own_logits.data_ptr(),
        )
        return embedded, own_logits

    def gradients(
        self,
        bases: Sequence[Tensor],
        scale: Tensor,
        embedded: Embedded,
        sums: Tensor,
        inner: Tensor,
        grad_own_logits: Tensor,
        spec: NegativesSpec,
        needs_grad: Sequence[bool],
    ) -> list[Tensor]:
        num_views = len(spec.candidates)
        if spec.compute_dtype != spec.accum_dtype or num_views > _cpu.max_views:
            return super().gradients(
                bases, scale, embedded, sums, inner, grad_own_logits, spec, needs_grad
            )
        _, num_samples, dim = embedded.z.shape
        *needs_bases, needs_mixing, _ = needs_grad
        new = scale.new_empty
        grads = [new(num_samples, dim) if needs else new(0) for needs in needs_bases]
        mixing, grad_scale = new(num_views, 2) if needs_mixing else new(0), new(())
        grad_own_logits = _readable(grad_own_logits)
        _function("gradients", scale.dtype)(
            _samples(embedded, scale, spec),
            sums.data_ptr(),
            inner.data_ptr(),
            grad_own_logits.data_ptr(),
            [grad.data_ptr() for grad in grads],  # 0 of an empty one
            mixing.data_ptr(),
            grad_scale.data_ptr(),
        )
        grads = [
            grad if base.dtype == grad.dtype or not needs else grad.to(base.dtype)
            for grad, base, needs in zip(grads, bases, needs_bases, strict=True)
        ]
        return [*grads, mixing, grad_scale]
