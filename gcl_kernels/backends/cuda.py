"""The block functions as CUDA C++ kernels, for NVIDIA sm_80 and later where Triton is missing.

The tensor side of ``csrc/cuda``, whose sources hold the definitions. What the extension
``gcl_kernels._cuda`` takes are addresses, sizes and a stream, so that one build serves every
PyTorch. Memory comes from PyTorch's allocator, launches go to its current stream, and nothing
waits for the device.

Tables are float32 [values, slots, lines]: a tile's results have a slot of their own, and ``fold``
adds the slots in their order. Nothing is atomic, so the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gcl_kernels import embeddings
from gcl_kernels.blocks import Block
from gcl_kernels.problem import FusedProblem, Problem, RowStats, Workspace, allows_tf32

_cuda: Any = None
try:
    _cuda = import_module("gcl_kernels._cuda")
except ImportError as error:
    _WHY_UNAVAILABLE = (
        f"its extension is not built ({error}): install gcl_kernels where nvcc is found, "
        "see docs/building.md"
    )

BLOCK_ROWS = 8192
"""Largest rows of a block: its weights take 128 MiB (256 MiB in float32), the whole workspace, and
launches are few. Smaller blocks gain nothing, since logits stay on the chip at any size."""

FUSED_BLOCK_ROWS = BLOCK_ROWS // 2
"""Largest samples of a fused block's side: four matrices of a quarter of the size."""


_NOT_FOUND = "this PyTorch finds no NVIDIA GPU"


def why_unavailable() -> str | None:
    """None where it can run on a device of this machine, else the reason."""
    reason = _why_no_gpu()
    if reason is not None or _cuda.device_type == "cpu":  # kernels built for an emulated GPU
        return reason
    if not torch.cuda.is_available():
        return _NOT_FOUND
    devices = range(torch.cuda.device_count())
    reasons = [_why_not_device(torch.device("cuda", index)) for index in devices]
    return None if None in reasons else reasons[0]


def _why_no_gpu() -> str | None:
    if _cuda is None:
        return _WHY_UNAVAILABLE
    if _cuda.device_type == "cpu":
        return None
    # torch.compile traces what asks; it knows what PyTorch's own functions return.
    if not torch.compiler.is_compiling() and _cuda.device_count() == 0:
        return _cuda.why_no_device()
    return None if torch.version.hip is None else _NOT_FOUND


def _why_not_device(device: torch.device) -> str | None:
    return _why_not_capability(torch.cuda.get_device_capability(device), _cuda.compiled_archs)


def _why_not_capability(capability: tuple[int, int], compiled_archs: str) -> str | None:
    """None where a device can run what was compiled for targets such as ``80;86;90a;120+PTX``."""
    major, minor = capability
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    for arch in compiled_archs.split(";"):
        number = int(arch.removesuffix("+PTX").rstrip("af"))
        if arch.removesuffix("+PTX").endswith("a"):
            serves = number == 10 * major + minor
        elif arch.endswith("+PTX"):
            serves = number <= 10 * major + minor
        else:
            serves = number // 10 == major and number % 10 <= minor
        if serves:
            return None
    return (
        f"its extension was built for {compiled_archs}, not for compute capability "
        f"{major}.{minor}: see docs/building.md"
    )


def why_not(device: torch.device, compute_dtype: torch.dtype) -> str | None:
    """None where it serves tensors on this device with this compute dtype, else the reason."""
    if compute_dtype == torch.float64:
        return "no float64: use backend='tiled'"
    reason = _why_no_gpu()
    if reason is not None:
        return reason
    if device.type != _cuda.device_type:
        return f"needs tensors on a {_cuda.device_type.upper()} device, got {device}"
    return _why_not_device(device) if device.type == "cuda" else None


def _check(z: Tensor) -> None:
    reason = why_not(z.device, z.dtype)
    if reason is not None:
        raise RuntimeError(f"backend: 'cuda' cannot serve this call: {reason}")


def block_rows(z: Tensor) -> int:
    """The largest number of rows of a block of these embeddings."""
    _check(z)
    return BLOCK_ROWS


def _product(dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return _cuda.Product.tf32 if allows_tf32() else _cuda.Product.float32
    return _cuda.Product.bfloat16 if dtype == torch.bfloat16 else _cuda.Product.float16


def _side(z: Tensor, ids: Tensor | None, where: slice) -> Any:
    return _cuda.Side(
        z=z[..., where, :].data_ptr(),
        base_stride=z.stride(0) if z.dim() == 3 else 0,
        ids=0 if ids is None else ids[where].data_ptr(),
        length=where.stop - where.start,
    )


def _start(on: Tensor, kernel: Any, /, **arguments: Any) -> None:
    """Launch on the current stream of a tensor's device."""
    stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else 0
    # The extension's own CUDA runtime makes this device current, for PyTorch's as well.
    with torch.cuda.device_of(on):
        kernel(device=on.device.index or 0, stream=stream, **arguments)


class _Call:
    """What the launches of one block share."""

    def __init__(self, problem: Problem | FusedProblem, block: Block, *others: Tensor) -> None:
        z = problem.z_rows
        for tensor in (problem.z_cols, problem.scale, *others):
            if tensor.device != z.device:
                raise RuntimeError(
                    f"backend: 'cuda' was given tensors on {z.device} and on {tensor.device}"
                )
        ids_rows, ids_cols = problem.ids_rows, problem.ids_cols
        if ids_rows is not None and ids_cols is not None:
            ids_rows, ids_cols = ids_rows.to(torch.int64), ids_cols.to(torch.int64)
        # Tensors whose addresses the extension has; a launch must find them alive.
        self._z, self._ids = z, (ids_rows, ids_cols)
        id_offset, id_period = block.id_diagonals
        self.block = _cuda.Block(
            rows=_side(z, ids_rows, block.rows),
            cols=_side(problem.z_cols, ids_cols, block.cols),
            scale=problem.scale.data_ptr(),
            dim=z.shape[-1],
            id_offset=id_offset,
            id_period=id_period,
            unit_rows=problem.unit_rows,
            diagonal=block.diagonal,
            serves_rows=block.serves_rows,
            serves_cols=block.serves_cols,
        )

    def over_tiles(self, kernel: Any, **arguments: Any) -> None:
        """Start a kernel of one program for each tile of the block."""
        product = _product(self._z.dtype)
        self.start(kernel, product=product, block=self.block, **arguments)

    def start(self, kernel: Any, **arguments: Any) -> None:
        _start(self._z, kernel, **arguments)


def _fold(
    table: Tensor, length: int, to_max: Tensor | None, to_sum: Tensor, where: slice, served: bool
) -> Any:
    """A fold of ``table`` [..., slots, groups * length] into ``[..., where]`` of the results."""
    return _cuda.Fold(
        table=table.data_ptr(),
        slots=table.shape[-2],
        length=length if served else 0,
        groups=table.shape[-1] // length,
        stride=to_sum.shape[-1],
        max=0 if to_max is None else to_max[..., where].data_ptr(),
        sum=to_sum[..., where].data_ptr(),
    )


def _tables(
    problem: Problem | FusedProblem, block: Block, values: tuple[int, ...], groups: int, tile: int
) -> tuple[Tensor, Tensor]:
    """Of rows and columns: [*values, slots, groups * lines]. Those of a diagonal block are the same
    lines, and share their slots."""
    num_rows, num_cols = block.shape
    rows = problem.scale.new_empty(*values, -(-num_cols // tile), groups * num_rows)
    if block.diagonal:
        return rows, rows
    return rows, problem.scale.new_empty(*values, -(-num_rows // tile), groups * num_cols)


def block_stats(
    problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block into the running statistics of its rows and columns (``cols`` is ``rows``'
    own object where the problem is square)."""
    call = _Call(problem, block, rows.sum, cols.sum)
    row_table, col_table = _tables(problem, block, (2,), 1, _cuda.TILE)
    call.over_tiles(
        _cuda.block_stats, row_table=row_table.data_ptr(), col_table=col_table.data_ptr()
    )
    _fold_stats(call, block, rows, cols, row_table, col_table)


def _fold_stats(
    call: _Call, block: Block, rows: RowStats, cols: RowStats, row_table: Tensor, col_table: Tensor
) -> None:
    num_rows, num_cols = block.shape
    serves_cols = block.serves_cols and not block.diagonal
    call.start(
        _cuda.fold,
        rows=_fold(row_table, num_rows, rows.max, rows.sum, block.rows, block.serves_rows),
        cols=_fold(col_table, num_cols, cols.max, cols.sum, block.cols, serves_cols),
    )


def _lines(lse: Tensor, grad: Tensor, where: slice) -> Any:
    return _cuda.Lines(lse=lse[..., where].data_ptr(), grad=grad[..., where].data_ptr())


def _output(tile: Tensor) -> Any:
    plane = tile.stride(1) if tile.dim() == 4 else 0
    return _cuda.Output(at=tile.data_ptr(), pitch=tile.stride(-2), plane=plane)


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
    out = workspace.tile(0, block.shape, problem.compute_dtype)
    _Call(problem, block, lse_rows, lse_cols, grad_rows, grad_cols, out).over_tiles(
        _cuda.block_weights,
        rows=_lines(lse_rows, grad_rows, block.rows),
        cols=_lines(lse_cols, grad_cols, block.cols),
        out=_output(out),
    )
    return out


# --- Score fusion: blocks of samples, four products for all pairs of views -----------------------


def fused_block_rows(z: Tensor, num_views: int) -> int:
    """The largest number of samples of a block's side, for views made of these bases."""
    _check(z)
    if num_views > _cuda.MAX_VIEWS:
        raise RuntimeError(
            f"backend: 'cuda' fuses at most {_cuda.MAX_VIEWS} views, got {num_views}"
        )
    return FUSED_BLOCK_ROWS


def _views(problem: FusedProblem, block: Block) -> Any:
    flat = [meets for row in problem.candidates for meets in row]
    return _cuda.Views(
        count=len(problem.bases),
        candidates=sum(1 << bit for bit, meets in enumerate(flat) if meets),
        row_coefficients=problem.coefficients_rows[..., block.rows].data_ptr(),
        col_coefficients=problem.coefficients_cols[..., block.cols].data_ptr(),
        row_samples=problem.coefficients_rows.shape[-1],
        col_samples=problem.coefficients_cols.shape[-1],
    )


def fused_block_stats(
    problem: FusedProblem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block of samples into the running statistics of all their views."""
    call = _Call(problem, block, rows.sum, cols.sum, problem.coefficients_cols)
    tables = _tables(problem, block, (2,), len(problem.bases), _cuda.FUSED_TILE)
    call.over_tiles(
        _cuda.fused_block_stats,
        views=_views(problem, block),
        row_table=tables[0].data_ptr(),
        col_table=tables[1].data_ptr(),
    )
    _fold_stats(call, block, rows, cols, *tables)


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
    """``F`` [2, 2, P, Q] of one block, in the compute dtype, valid until the next call with this
    workspace; ``inner_*`` [V, 2, N] are added to."""
    out = workspace.tile(0, (2, 2, *block.shape), problem.compute_dtype)
    call = _Call(problem, block, lse_rows, lse_cols, grad_rows, grad_cols, inner_rows, inner_cols)
    tables = _tables(problem, block, (), 2 * len(problem.bases), _cuda.FUSED_TILE)
    call.over_tiles(
        _cuda.fused_block_weights,
        views=_views(problem, block),
        rows=_lines(lse_rows, grad_rows, block.rows),
        cols=_lines(lse_cols, grad_cols, block.cols),
        out=_output(out),
        row_table=tables[0].data_ptr(),
        col_table=tables[1].data_ptr(),
    )
    num_rows, num_cols = block.shape
    call.start(
        _cuda.fold,
        rows=_fold(tables[0], num_rows, None, inner_rows, block.rows, True),
        cols=_fold(tables[1], num_cols, None, inner_cols, block.cols, not block.diagonal),
    )
    return out


# --- Samples: unit vectors, own-sample similarities, and their gradients --------------------------


def _serves(views: Sequence[Tensor], compute_dtype: torch.dtype, num_views: int) -> bool:
    """Whether the extension reads these views as they are."""
    return num_views <= _cuda.MAX_VIEWS and all(
        view.dtype == compute_dtype and view.stride(1) == 1 for view in views
    )


def _embeddings(views: Sequence[Tensor]) -> Any:
    return _cuda.Embeddings(
        at=[view.data_ptr() for view in views],
        stride=[view.stride(0) for view in views],
        samples=views[0].shape[0],
        dim=views[0].shape[1],
    )


def _units(views: Sequence[Tensor], z: Tensor) -> dict[str, Any]:
    """What unrounded unit vectors are read from: ``z``, or the embeddings where it is rounded."""
    rounded = z.dtype != torch.float32
    return {"units": _embeddings(views if rounded else z.unbind(0)), "rounded": rounded}


def _addresses(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[int]:
    return [t.data_ptr() if needs else 0 for t, needs in zip(tensors, needed, strict=True)]


def embed(
    views: Sequence[Tensor],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.embed`, which takes views of other dtypes and layouts."""
    if not _serves(views, compute_dtype, len(views)):
        return embeddings.embed(views, own_pairs, normalize, compute_dtype, scale)
    results = embeddings.empty_embedded(views, normalize, compute_dtype, scale)
    z, norm, inverse, own, own_logits = results
    _start(
        z,
        _cuda.embed,
        product=_product(z.dtype),
        views=_embeddings(views),
        normalize=normalize,
        pairs=list(own_pairs),
        scale=scale.data_ptr(),
        absent=embeddings.ABSENT,
        z=z.data_ptr(),
        norm=norm.data_ptr(),
        inverse=inverse.data_ptr(),
        own=own.data_ptr(),
        own_logits=own_logits.data_ptr(),
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
    """As :func:`gcl_kernels.embeddings.embed_backward`; ``hz`` stays."""
    if not _serves(views, z.dtype, len(views)):
        return embeddings.embed_backward(
            views, normalize, z, norm, inverse, own, hz, grad_own_logits, scale, needs_grad
        )
    grads = [z.new_empty(z.shape[1:] if needs else 0) for needs in needs_grad]
    shares = hz.new_empty(z.shape[1])
    grad_own_logits = grad_own_logits.contiguous()
    _start(
        z,
        _cuda.embed_backward,
        product=_product(z.dtype),
        **_units(views, z),
        normalize=normalize,
        norm=norm.data_ptr(),
        inverse=inverse.data_ptr(),
        own=own.data_ptr(),
        hz=hz.data_ptr(),
        grad_own_logits=grad_own_logits.data_ptr(),
        scale=scale.data_ptr(),
        grads=_addresses(grads, needs_grad),
        shares=shares.data_ptr(),
    )
    return grads, shares.sum()


def _mixture(
    bases: Sequence[int],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    inverse: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    dots: Tensor,
) -> Any:
    return _cuda.Mixture(
        base_of=list(bases),
        normalize=normalize,
        self=embeddings.pairs_itself(own_pairs),
        inverse=inverse.data_ptr(),
        lengths=lengths.data_ptr(),
        coefficients=coefficients.data_ptr(),
        dots=dots.data_ptr(),
    )


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
    if not _serves(views, compute_dtype, len(bases)):
        return embeddings.embed_fused(
            views, mixing, bases, own_pairs, normalize, compute_dtype, scale
        )
    results = embeddings.empty_fused(views, len(bases), normalize, compute_dtype, scale)
    z, inverse, lengths, coefficients, dots, own_logits = results
    mixing = mixing.contiguous()
    _start(
        z,
        _cuda.embed_fused,
        product=_product(z.dtype),
        bases=_embeddings(views),
        mixture=_mixture(bases, own_pairs, normalize, inverse, lengths, coefficients, dots),
        pairs=list(own_pairs),
        scale=scale.data_ptr(),
        absent=embeddings.ABSENT,
        mixing=mixing.data_ptr(),
        z=z.data_ptr(),
        own_logits=own_logits.data_ptr(),
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
    """As :func:`gcl_kernels.embeddings.fused_gradients`; ``r`` stays."""
    if not _serves(views, z.dtype, len(bases)):
        return embeddings.fused_gradients(
            views, bases, own_pairs, normalize, z, inverse, lengths, coefficients, dots, r, inner,
            grad_own_logits, scale, needs_grad,
        )  # fmt: skip
    grads = [z.new_empty(z.shape[1:] if needs else 0) for needs in needs_grad[:2]]
    shares = r.new_empty(2 * len(bases) + 1, z.shape[1])
    grad_own_logits = grad_own_logits.contiguous()
    _start(
        z,
        _cuda.fused_gradients,
        product=_product(z.dtype),
        **_units(views, z),
        mixture=_mixture(bases, own_pairs, normalize, inverse, lengths, coefficients, dots),
        r=r.data_ptr(),
        inner=inner.data_ptr(),
        grad_own_logits=grad_own_logits.data_ptr(),
        scale=scale.data_ptr(),
        grads=_addresses(grads, needs_grad[:2]),
        shares=shares.data_ptr(),
    )
    return grads, *embeddings.sum_shares(shares, needs_grad[2])
