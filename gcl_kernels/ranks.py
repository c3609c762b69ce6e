"""In-batch retrieval figures: where each positive stands among the other samples' embeddings.

Counted in chunks of rows, as the losses are summed in tiles: no similarity matrix is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gcl_kernels.losses import GCLLoss
from gcl_kernels.spec import (
    HALF_DTYPES,
    NORM_EPS,
    BoolTable,
    Table,
    accum_dtype_of,
    candidate_table,
    check_choice,
    check_fusion_weights,
    check_normalize,
    check_views,
    resolve_compute_dtype,
    resolve_present,
    resolve_sample_ids,
    view_list,
)

Pool = Literal["local", "union"]

CHUNK_BYTES = {"cpu": 64 << 20}
"""Memory for a chunk of rows on a type of device, but for one row at least."""
CHUNK_BYTES_ELSEWHERE = 256 << 20

OWN_ROWS = 128
"""Samples at a time whose own logits are multiplied."""

LEVEL = 4.0
"""Logits that differ by less than ``LEVEL * sqrt(D) * eps * |z| |z'|`` are level: a BLAS sums up a
column at the edge of a matrix in another order than one in its middle, and matrices of one shape in
another order than those of another. Measured between equal embeddings whose coordinates are all
alike (D = 768) 0.7 within a product and 2.1 between products; where coordinates differ 0.2."""


@torch.no_grad()
def positive_ranks(
    views: Sequence[Tensor],
    *,
    pool: Pool = "local",
    candidates: Table | None = None,
    normalize: bool = True,
    sample_ids: Tensor | None = None,
    present: Tensor | Sequence[Tensor | None] | None = None,
    fusion_weights: Sequence[float | Tensor] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """How many candidates stand before each positive or level with it: in-batch retrieval.

        ranks[a, b, j] = #{ candidates (m, k) of (a, j): not <z_a^j, z_m^k> < <z_a^j, z_b^j> }

    A rank of 0 is a hit at 1. Equal logits lose, also where their products were rounded
    differently, and so does NaN: embeddings that are all alike find nothing. The products take
    ``torch.mm`` on every device: ``V (V - 1) N^2 D`` operations for the pool ``"local"``, for
    ``"union"`` ``V (V + 1) N^2 D``.

    Args:
        views: V tensors [N, D], at least two; float64, float32, bfloat16 or float16, dtypes may
            differ. Of many processes: this one's, or what they gathered.
        pool: ``"local"``: the candidates of ``ranks[a, b]`` are the embeddings of view b;
            ``"union"``: those of all views. Of other samples in either.
        candidates: of the pool ``"union"``, V x V booleans; entry [a][m] says whether anchors of
            view a meet view m. Default: all true.
        normalize: divide embeddings by their length (at least 1e-12) first.
        sample_ids: N integers; embeddings of samples with equal ids are no candidates of each
            other. Default: all different.
        present: booleans [V, N] of the given views, as for :func:`gcl_kernels.gcl_loss`: an
            embedding that is absent is no anchor, no positive and no candidate, and may hold NaN.
        fusion_weights: of two views ``(alpha, beta)``, two finite numbers or tensors of shape [] or
            [1]: ``alpha * views[0] + beta * views[1]`` is the third, and V is 3. Default: None.
        compute_dtype: dtype of the products, as for :func:`gcl_kernels.gcl_loss`.

    Returns:
        int64 [V, V, N]: for anchor view a, positive view b and sample j; 0 without any candidate,
        -1 where a is b or either is absent. Without a gradient. Memory: unit vectors of all views
        in the compute dtype, and a chunk of 64 MiB (on another device than a CPU 256 MiB), or of
        one row against a view.

    Raises:
        ValueError, TypeError: malformed arguments; the message names argument, expected and got.
    """
    views = view_list(views)
    if len(views) < 2:
        raise ValueError(f"views: expected at least 2, got {len(views)}")
    check_views(views, [f"views[{v}]" for v in range(len(views))])
    check_choice("pool", pool, get_args(Pool))
    check_normalize(normalize)
    dtype = resolve_compute_dtype(compute_dtype, views)
    there = resolve_present(present, len(views), views[0])
    if fusion_weights is not None:
        if len(views) != 2:
            raise ValueError(f"fusion_weights: expected None or 2 views, got {len(views)} views")
        alpha, beta = check_fusion_weights(fusion_weights, views[0].device)
        e_0, e_1 = (view.to(accum_dtype_of(dtype)) for view in views)
        views.append(alpha * e_0 + beta * e_1)
        if there is not None:
            there = torch.cat([there, there.all(0, keepdim=True)])
    num_views, num_samples = len(views), views[0].shape[0]
    if pool == "local" and candidates is not None:
        raise ValueError(
            "candidates: expected None with pool='local', whose candidates are of one view, got a "
            "table"
        )
    table = candidate_table(candidates, num_views)
    ids = resolve_sample_ids(sample_ids, views[0])
    if ids is None:
        ids = torch.arange(num_samples, device=views[0].device)
    z = _embed(views, normalize, dtype)
    bars = _bars(z)
    ranks = ids.new_zeros(num_views, num_views, num_samples)
    for a in range(num_views):
        for m in range(a, num_views):
            # A product serves the anchors of its rows and those of its columns.
            of_rows = _positives(a, m, pool, table)
            of_cols = _positives(m, a, pool, table) if a != m else []
            for rows in _chunks(z) if of_rows or of_cols else ():
                out = ids[rows, None] == ids
                if there is not None:
                    out |= ~(there[a, rows, None] & there[m])
                product = _product(z[a, rows], z[m]).masked_fill_(out, torch.inf)  # never below
                # What is below, and not what is above or level: NaN is neither.
                for b in of_rows:
                    below = _count(product < bars[a, b, rows, None], 1)
                    ranks[a, b, rows] += _count(~out, 1) - below
                for b in of_cols:
                    ranks[m, b] += _count(~out, 0) - _count(product < bars[m, b], 0)
    void = torch.eye(num_views, dtype=torch.bool, device=z.device).unsqueeze(-1)
    if there is not None:
        void = void | ~(there.unsqueeze(1) & there)
    return ranks.masked_fill(void, -1)


def _positives(a: int, m: int, pool: Pool, table: BoolTable) -> list[int]:
    """The views of positives for which anchors of view ``a`` meet candidates of view ``m``."""
    if pool == "local":
        return [m] if m != a else []
    return [b for b in range(len(table)) if b != a] if table[a][m] else []


def _embed(views: Sequence[Tensor], normalize: bool, dtype: torch.dtype) -> Tensor:
    """[V, N, D] in the products' dtype.

    An embedding that holds NaN or inf, or whose length overflows, is NaN throughout: its logits
    could be anything, -inf as well, which would stand behind every positive.
    """
    embedded = []
    for view in views:
        e = view.to(accum_dtype_of(dtype))
        void = 0 * torch.linalg.vector_norm(e, dim=-1, keepdim=True)
        z = F.normalize(e, dim=-1, eps=NORM_EPS) if normalize else e
        embedded.append((z + void).to(dtype))
    return torch.stack(embedded)


def _bars(z: Tensor) -> Tensor:
    """[V, V, N]: what is not below it stands before the positive or level with it.

    The positives' logits come out of products too, whose operands may be rounded once more
    (TensorFloat-32): then equal embeddings have equal logits but for the order of the sum.
    """
    num_views, num_samples, dim = z.shape
    logits = []
    for start in range(0, num_samples, OWN_ROWS):
        block = z[:, start : start + OWN_ROWS]
        rows = block.reshape(-1, dim)
        product = _product(rows, rows).view(*block.shape[:2], *block.shape[:2])
        logits.append(product.diagonal(dim1=1, dim2=3))
    logit = torch.cat(logits, -1)
    lengths = torch.linalg.vector_norm(z, dim=-1, dtype=logit.dtype)
    margin = LEVEL * math.sqrt(dim) * torch.finfo(logit.dtype).eps
    # NaN where a logit overflows, and with it its bound: then nothing is below.
    return logit - margin * lengths.unsqueeze(1) * lengths


def _chunks(z: Tensor) -> Iterator[slice]:
    """Rows whose products with a view fit the memory for a chunk."""
    _, num_samples, _ = z.shape
    # Beside the product what is out, its contrary or a comparison, and that in int32 for its sum.
    row_bytes = num_samples * (accum_dtype_of(z.dtype).itemsize + 6)
    size = max(1, CHUNK_BYTES.get(z.device.type, CHUNK_BYTES_ELSEWHERE) // row_bytes)
    for start in range(0, num_samples, size):
        yield slice(start, min(start + size, num_samples))


def _product(rows: Tensor, cols: Tensor) -> Tensor:
    """Logits in the accumulation dtype."""
    if rows.device.type == "meta":
        return torch.mm(rows, cols.T)
    with torch.autocast(rows.device.type, enabled=False):  # the compute dtype has regard to it
        if rows.dtype in HALF_DTYPES:  # on CUDA only
            return torch.mm(rows, cols.T, out_dtype=torch.float32)
        return torch.mm(rows, cols.T)


def _count(mask: Tensor, dim: int) -> Tensor:
    """A fifth of the time, and half the memory, of summing booleans up in int64."""
    return mask.sum(dim, dtype=torch.int32)


def hits(ranks: Tensor, k: int = 1) -> Tensor:
    """The share of anchors whose positive is among the first ``k``.

    Args:
        ranks: of :func:`positive_ranks`, [V, V, N] integers.
        k: at least 1.

    Returns:
        float32 [V, V], row: anchor view, column: positive view; NaN where no sample has both, and
        on the diagonal.

    Raises:
        ValueError: ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    exists = ranks >= 0
    return (exists & (ranks < k)).sum(-1) / exists.sum(-1)


def watch_ranks(
    loss: nn.Module,
    callback: Callable[[Tensor], None],
    *,
    every: int = 100,
    pool: Pool = "union",
) -> RemovableHandle:
    """Have a trainer's loss report the ranks of its batches' positives.

    Args:
        loss: a :class:`gcl_kernels.GCLLoss`, or a module that holds one, as the losses of
            ``gcl_kernels.integrations`` do.
        callback: is given what :func:`positive_ranks` returns, int64 [3, 3, N] of image, text and
            fused embeddings, on their device: reading a value waits for the device. Candidates are
            this process's samples.
        every: of so many calls that have a gradient, the first; others are not counted.
        pool: as in :func:`positive_ranks`.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: not exactly one ``GCLLoss`` in ``loss``; ``every`` below 1; an unknown pool.
    """
    found = [module for module in loss.modules() if isinstance(module, GCLLoss)]
    if len(found) != 1:
        raise ValueError(f"loss: expected a module with one gcl_kernels.GCLLoss, got {len(found)}")
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    check_choice("pool", pool, get_args(Pool))
    calls = 0

    def report(module: GCLLoss, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        nonlocal calls
        if not out.requires_grad:
            return
        calls += 1
        if calls % every != 1 % every:
            return
        given = dict(zip(("e_i", "e_t", "e_it"), args, strict=False)) | kwargs
        views = [given["e_i"], given["e_t"]]
        fusion_weights = None
        if given.get("e_it") is None:
            fusion_weights = module.alpha, module.beta
        else:
            views.append(given["e_it"])
        ranks = positive_ranks(
            views,
            pool=pool,
            normalize=module.normalize,
            sample_ids=given.get("sample_ids"),
            present=given.get("present"),
            fusion_weights=fusion_weights,
            compute_dtype=module.compute_dtype,
        )
        callback(ranks)

    # Not traced: it counts, and the callback is anything.
    return found[0].register_forward_hook(torch.compiler.disable(report), with_kwargs=True)
