"""The block functions for a CPU in C++ (SIMD).

Definitions as in ``tiled``. One call computes a block's statistics or weights in one pass over the
tile while it lies in the cache, and one call makes unit vectors or their gradients. A whole pass
over the blocks is one call, too: matrix products are those of PyTorch's BLAS, whose functions the
extension is given, or its own where those are faster. The extension ``gcl_kernels._cpu``
(``csrc/cpu``) takes addresses, so that it serves every PyTorch; what it computes itself does not
depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcl_kernels import embeddings
from gcl_kernels.blocks import Block
from gcl_kernels.embeddings import ABSENT
from gcl_kernels.problem import (
    FusedProblem,
    Problem,
    RowStats,
    Workspace,
    bounded,
    fused_products,
)
from gcl_kernels.problem import add_product as torch_add_product
from gcl_kernels.problem import product as torch_product
from gcl_kernels.spec import NORM_EPS

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

HALVES_DIAGONAL = _cpu is None or _cpu.products() != "own"
"""BLAS computes both equal halves of a block on the diagonal, the extension's product one."""

_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def why_unavailable() -> str | None:
    """None where the extension is built, else how to get it."""
    return _WHY_UNAVAILABLE


def why_not(device: torch.device, compute_dtype: torch.dtype) -> str | None:
    """None where tensors of this device and dtype are served, else the reason."""
    if device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    if compute_dtype not in _SUFFIX:
        return f"it computes in float32 and float64, not in {compute_dtype}"
    return _WHY_UNAVAILABLE


def block_rows(z: Tensor) -> int:
    """The largest number of rows of a block of these embeddings."""
    return BLOCK_ROWS


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(_cpu, f"{name}_{_SUFFIX[dtype]}")


def _scale(problem: Problem | FusedProblem) -> float:
    return float(problem.scale) if problem.max_scale is None else problem.max_scale


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


def _ids(problem: Problem | FusedProblem) -> tuple[Tensor | None, Tensor | None]:
    """Explicit ids as int64; they must outlive the call that takes their addresses."""
    rows = None if problem.ids_rows is None else _readable(problem.ids_rows.to(torch.int64))
    if problem.ids_cols is problem.ids_rows:
        return rows, rows
    return rows, None if problem.ids_cols is None else _readable(problem.ids_cols.to(torch.int64))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _layout(matrix: Tensor) -> tuple[int, bool]:
    """The distance of its rows; or, where it lies by columns, of those, and true."""
    if matrix.stride(1) == 1:
        return matrix.stride(0), False
    return matrix.stride(1), True


def _by_pytorch() -> bool:
    """Whether products are calls of PyTorch from Python, as no other ones are at hand."""
    return _cpu.products() == "pytorch"


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    _function("product", out.dtype)(
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


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b``; rows or columns of ``a`` and ``b``, and rows of ``out``, are contiguous."""
    if _by_pytorch():
        return torch_product(a, b, out)
    _multiply(a, b, out, add=False)
    return out


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """``accumulator += a @ b``."""
    if _by_pytorch():
        return torch_add_product(accumulator, a, b)
    _multiply(a, b, accumulator, add=True)


def _dots(problem: Problem, block: Block, workspace: Workspace) -> Tensor:
    tile = workspace.kept(block)
    if tile is None:
        tile = workspace.tile(0, block.shape, problem.accum_dtype)
    return product(problem.z_rows[block.rows], problem.z_cols[block.cols].t(), tile)


def block_stats(
    problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block into the running statistics of its rows and columns."""
    dots, ids = _dots(problem, block, workspace), _ids(problem)
    _function("block_stats", problem.accum_dtype)(
        torch.get_num_threads(),
        dots.data_ptr(),
        dots.stride(0),
        _place(block),
        *map(_address, ids),
        _scale(problem),
        bounded(problem),
        rows.max.data_ptr(),
        rows.sum.data_ptr(),
        cols.max.data_ptr(),
        cols.sum.data_ptr(),
    )


def block_weights(
    problem: Problem,
    block: Block,
    lse_rows: Tensor,
    lse_cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    workspace: Workspace,
) -> Tensor:
    """``H`` of one block, valid until the next call with this workspace.

    ``lse_*`` hold +inf for rows without a negative: every weight in them is then zero. A kept tile
    is what ``block_stats`` left, and stays as it is.
    """
    dots, ids = workspace.kept(block), _ids(problem)
    if dots is None:
        dots = _dots(problem, block, workspace)
    out = workspace.tile(0, block.shape, problem.accum_dtype)
    grad_rows, grad_cols = _readable(grad_rows), _readable(grad_cols)
    _function("block_weights", problem.accum_dtype)(
        torch.get_num_threads(),
        dots.data_ptr(),
        dots.stride(0),
        _place(block),
        *map(_address, ids),
        _scale(problem),
        bounded(problem),
        lse_rows.data_ptr(),
        grad_rows.data_ptr(),
        lse_cols.data_ptr(),
        grad_cols.data_ptr(),
        out.data_ptr(),
        out.stride(0),
    )
    return out


def _pass(problem: Problem, plan: tuple[Block, ...], kept: Tensor) -> tuple[Any, ...]:
    rows, dim = problem.z_rows.shape
    return (
        torch.get_num_threads(),
        _places(plan),
        problem.z_rows.data_ptr(),
        rows,
        dim,
        _scale(problem),
        bounded(problem),
        kept.data_ptr(),
        kept.numel(),
    )


def statistics(problem: Problem, plan: tuple[Block, ...], kept: Tensor) -> Tensor | None:
    """``neg_lse`` [M]: all blocks in one call, whose cost in Python would be a small batch's. None
    where the products are calls from Python."""
    if _by_pytorch():
        return None
    ids, _ = _ids(problem)
    neg_lse = problem.scale.new_empty(problem.z_rows.shape[0])
    _function("statistics", problem.accum_dtype)(
        *_pass(problem, plan, kept), _address(ids), neg_lse.data_ptr()
    )
    return neg_lse


def matrix_gradient(
    problem: Problem,
    plan: tuple[Block, ...],
    kept: Tensor,
    neg_lse: Tensor,
    grad: Tensor,
    needs_grad: Sequence[bool],
) -> Tensor | None:
    """``H z`` [M, D] in one call. None where the products are calls from Python, or where the
    scale's gradient has shares that are not in ``<z, H z>``."""
    *needs_view, needs_scale = needs_grad
    if _by_pytorch() or (needs_scale and not all(needs_view)):
        return None
    ids, _ = _ids(problem)
    grad, hz = _readable(grad), torch.empty_like(problem.z_rows)
    _function("matrix_gradient", problem.accum_dtype)(
        *_pass(problem, plan, kept),
        _address(ids),
        neg_lse.data_ptr(),
        grad.data_ptr(),
        needs_view,
        hz.data_ptr(),
    )
    return hz


def _plain(views: Sequence[Tensor], compute_dtype: torch.dtype, num_views: int) -> bool:
    """Whether the extension reads these views as they are."""
    return num_views <= _cpu.max_views and all(
        view.dtype == compute_dtype and view.stride(1) == 1 and _is_aligned(view) for view in views
    )


def embed(
    views: Sequence[Tensor],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.embed`, which takes views of other dtypes and layouts."""
    num_samples, dim = views[0].shape
    if not _plain(views, compute_dtype, len(views)):
        return embeddings.embed(views, own_pairs, normalize, compute_dtype, scale)
    results = embeddings.empty_embedded(views, normalize, compute_dtype, scale)
    z, norm, inverse, own, own_logits = results
    _function("embed", compute_dtype)(
        torch.get_num_threads(),
        [view.data_ptr() for view in views],
        [view.stride(0) for view in views],
        num_samples,
        dim,
        normalize,
        NORM_EPS,
        [view for pair in own_pairs for view in pair],
        float(scale),
        ABSENT,
        z.data_ptr(),
        norm.data_ptr(),
        inverse.data_ptr(),
        own.data_ptr(),
        own_logits.data_ptr(),
    )
    return results


def embed_backward(
    views: Sequence[Tensor],
    normalize: bool,
    z: Tensor,
    norm: Tensor,
    inverse: Tensor,
    own: Tensor,
    hz: Tensor,
    grad_own_logits: Tensor,
    scale: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[list[Tensor], Tensor]:
    """As :func:`gcl_kernels.embeddings.embed_backward`."""
    num_views, num_samples, dim = z.shape
    if any(view.dtype != z.dtype for view in views) or num_views > _cpu.max_views:
        return embeddings.embed_backward(
            views, normalize, z, norm, inverse, own, hz, grad_own_logits, scale, needs_grad
        )
    grads = [z.new_empty((num_samples, dim) if needs else 0) for needs in needs_grad]
    grad_scale = z.new_empty(num_views, num_samples)
    grad_own_logits = _readable(grad_own_logits)
    _function("embed_backward", z.dtype)(
        torch.get_num_threads(),
        num_samples,
        dim,
        normalize,
        NORM_EPS,
        float(scale),
        z.data_ptr(),
        norm.data_ptr(),
        inverse.data_ptr(),
        own.data_ptr(),
        hz.data_ptr(),
        grad_own_logits.data_ptr(),
        [grad.data_ptr() if needs else 0 for grad, needs in zip(grads, needs_grad, strict=True)],
        grad_scale.data_ptr(),
    )
    return grads, grad_scale.sum()


def embed_fused(
    views: Sequence[Tensor],
    mixing: Tensor,
    bases: Sequence[int],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.embed_fused`, which takes views of other dtypes."""
    if not _plain(views, compute_dtype, len(bases)):
        return embeddings.embed_fused(
            views, mixing, bases, own_pairs, normalize, compute_dtype, scale
        )
    num_samples, dim = views[0].shape
    results = embeddings.empty_fused(views, len(bases), normalize, compute_dtype, scale)
    z, inverse, lengths, coefficients, dots, own_logits = results
    mixing = _readable(mixing)
    _function("embed_fused", compute_dtype)(
        torch.get_num_threads(),
        [view.data_ptr() for view in views],
        [view.stride(0) for view in views],
        num_samples,
        dim,
        bases,
        [view for pair in own_pairs for view in pair],
        mixing.data_ptr(),
        normalize,
        NORM_EPS,
        float(scale),
        ABSENT,
        z.data_ptr(),
        inverse.data_ptr(),
        lengths.data_ptr(),
        coefficients.data_ptr(),
        dots.data_ptr(),
        own_logits.data_ptr(),
    )
    return results


def fused_gradients(
    views: Sequence[Tensor],
    bases: Sequence[int],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    z: Tensor,
    inverse: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    dots: Tensor,
    r: Tensor,
    inner: Tensor,
    grad_own_logits: Tensor,
    scale: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.fused_gradients`."""
    if any(view.dtype != z.dtype for view in views) or len(bases) > _cpu.max_views:
        return embeddings.fused_gradients(
            views, bases, own_pairs, normalize, z, inverse, lengths, coefficients, dots, r, inner,
            grad_own_logits, scale, needs_grad,
        )  # fmt: skip
    _, num_samples, dim = z.shape
    grads = [z.new_empty((num_samples, dim) if needs else 0) for needs in needs_grad[:2]]
    shares = z.new_empty(2 * len(bases) + 1, num_samples)
    grad_own_logits = _readable(grad_own_logits)
    _function("fused_gradients", z.dtype)(
        torch.get_num_threads(),
        num_samples,
        dim,
        bases,
        embeddings.pairs_itself(own_pairs),
        normalize,
        NORM_EPS,
        float(scale),
        z.data_ptr(),
        inverse.data_ptr(),
        lengths.data_ptr(),
        coefficients.data_ptr(),
        dots.data_ptr(),
        r.data_ptr(),
        inner.data_ptr(),
        grad_own_logits.data_ptr(),
        [
            grad.data_ptr() if needs else 0
            for grad, needs in zip(grads, needs_grad[:2], strict=True)
        ],
        shares.data_ptr(),
    )
    return grads, *embeddings.sum_shares(shares, needs_grad[2])


def fused_block_rows(z: Tensor, num_views: int) -> int:
    """The largest number of samples of a block's side, for views made of these bases."""
    return FUSED_BLOCK_ROWS


def _views(problem: FusedProblem) -> tuple[list[int], list[bool]]:
    """Which view is which base, -1 for a combination, and whose candidates are whose, flat."""
    bases = [-1 if base is None else base for base in problem.bases]
    return bases, [entry for row in problem.candidates for entry in row]


def _fused_arguments(
    problem: FusedProblem, block: Block, y: Tensor, ids: tuple[Tensor | None, Tensor | None]
) -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        y.data_ptr(),
        y.stride(2),
        _place(block),
        *map(_address, ids),
        *_views(problem),
        _scale(problem),
        bounded(problem),
        problem.coefficients_rows.data_ptr(),
        problem.coefficients_rows.shape[2],
        problem.coefficients_cols.data_ptr(),
        problem.coefficients_cols.shape[2],
    )


def _fused_pass(problem: FusedProblem, plan: tuple[Block, ...], kept: Tensor) -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        _places(plan),
        problem.z_rows.data_ptr(),
        *problem.z_rows.shape[1:],
        *_views(problem),
        _scale(problem),
        bounded(problem),
        problem.coefficients_rows.data_ptr(),
        kept.data_ptr(),
        kept.numel(),
    )


def fused_statistics(problem: FusedProblem, plan: tuple[Block, ...], kept: Tensor) -> Tensor | None:
    """As :func:`statistics`: [V, N]."""
    if _by_pytorch():
        return None
    ids, _ = _ids(problem)
    neg_lse = problem.scale.new_empty(len(problem.bases), problem.z_rows.shape[1])
    _function("fused_statistics", problem.accum_dtype)(
        *_fused_pass(problem, plan, kept), _address(ids), neg_lse.data_ptr()
    )
    return neg_lse


def fused_matrix_gradient(
    problem: FusedProblem,
    plan: tuple[Block, ...],
    kept: Tensor,
    neg_lse: Tensor,
    grad: Tensor,
    needs_base: Sequence[bool],
) -> tuple[Tensor, Tensor] | None:
    """``R`` [2, N, D] and ``U`` [V, 2, N] in one call; None where the products are calls from
    Python."""
    if _by_pytorch():
        return None
    ids, _ = _ids(problem)
    grad = _readable(grad)
    r, inner = torch.empty_like(problem.z_rows), torch.zeros_like(problem.coefficients_rows)
    _function("fused_matrix_gradient", problem.accum_dtype)(
        *_fused_pass(problem, plan, kept),
        _address(ids),
        neg_lse.data_ptr(),
        grad.data_ptr(),
        needs_base,
        r.data_ptr(),
        inner.data_ptr(),
    )
    return r, inner


def fused_block_stats(
    problem: FusedProblem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block over samples into the running statistics of its rows' and columns' views."""
    y, ids = fused_products(problem, block, workspace, product), _ids(problem)
    _function("fused_block_stats", problem.accum_dtype)(
        *_fused_arguments(problem, block, y, ids),
        rows.max.data_ptr(),
        rows.sum.data_ptr(),
        cols.max.data_ptr(),
        cols.sum.data_ptr(),
    )


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
    """``F`` [2, 2, P, Q] of one block over samples, valid until the next call, and its share of
    ``U``: see ``score_fusion``. A kept tile is what ``fused_block_stats`` left, and stays."""
    y, ids = workspace.kept(block), _ids(problem)
    if y is None:
        y = fused_products(problem, block, workspace, product)
    out = workspace.tile(0, (2, 2, *block.shape), problem.accum_dtype)
    grad_rows, grad_cols = _readable(grad_rows), _readable(grad_cols)
    _function("fused_block_weights", problem.accum_dtype)(
        *_fused_arguments(problem, block, y, ids),
        lse_rows.data_ptr(),
        grad_rows.data_ptr(),
        lse_cols.data_ptr(),
        grad_cols.data_ptr(),
        inner_rows.data_ptr(),
        inner_cols.data_ptr(),
        out.data_ptr(),  # may be y's place: a chunk of y is read before its F is written
        out.stride(2),
    )
    return out
