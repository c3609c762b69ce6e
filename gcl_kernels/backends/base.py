"""What a backend does for a call, in PyTorch's calls where it has nothing better.

Its part over blocks is its own: block functions, or whole passes. The O(M D) side is here: unit
vectors, own-sample similarities, and their gradients. With ``k`` the coefficients that make views
of bases (one and zero where views are given, each its own base) and ``u_b`` unrounded unit vectors:

    dots_bc = <u_b, u_c>             toward_vb = sum_c k_vc dots_cb = <z_v, u_b>
    own_vw  = sum_b toward_vb k_wb   own_logits = s own, ABSENT where the pair was not asked for

Backward, from ``H z`` (where views are made of bases: ``R_b = sum_v k_vb (H z)_v`` and ``U_vb =
<(H z)_v, u_b>``), with ``K_vw = s (dL/d own_logits_vw + dL/d own_logits_wv)`` and ``G_v = dL/dz_v =
s (H z)_v + sum_w K_vw z_w``:

    dL/de_b       = 1/|e_b| (s R_b + sum_c Q_bc u_c)
    Q_bc          = sum_v k_vb (sum_w K_vw k_wc - g_v k_vc)          g_v = <G_v, z_v>
    dL/dmixing_vb = sum_j |e_b| / |e_v| (<G_v, u_b> - g_v <z_v, u_b>)
    dL/ds         = 1/2 sum_vj <(H z)_v, z_v> + sum of dL/d own_logits * own

``g_v`` is left out where ``|e_v|`` is below eps or nothing is normalised. Rows pass in chunks, so
that no second float32 copy of all embeddings exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gcl_kernels.blocks import Block
from gcl_kernels.problem import (
    Embedded,
    FusedProblem,
    Lines,
    Problem,
    RowStats,
    SampleData,
    Workspace,
)
from gcl_kernels.spec import ABSENT, HALF_DTYPES, NORM_EPS, LossSpec, NegativesSpec

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "default": 1 << 22}
"""Elements per base and chunk: 1 MiB of float32 stays in a CPU's cache; 16 MiB fill a GPU, and the
few chunks that exist at once stay far below the accumulator."""


class Backend:
    """A row of ``dispatch.BACKENDS``.

    Attributes:
        fuses_scores: it has block functions of score fusion. Without them the fused embeddings are
            formed, as a third view like any other.
        joins_bases: the weights of score fusion are one matrix a block, for one batched product a
            side where there would be four; a copy of the embeddings is then made in each backward
            pass, unless they are one block.
        makes_losses: it has :meth:`loss`, for small batches.
        keeps_tiles: the first tiles stay in memory between the passes, see ``problem``.
        kept_elements: of them at most, if not as many as there.
        halves_diagonal: if not 0, it computes both halves of a block on the diagonal, which are
            equal; the plan then cuts these blocks finer, of several each, and one that is alone
            from this many rows on.
    """

    fuses_scores = True
    joins_bases = False
    makes_losses = False
    keeps_tiles = False
    kept_elements: int | None = None
    halves_diagonal = 0

    def why_unavailable(self) -> str | None:
        """None where it can run on a device of this machine, else the reason."""
        return None

    def why_not(self, device: torch.device, compute_dtype: torch.dtype) -> str | None:
        """None where it serves tensors of this device and compute dtype, else the reason, which may
        be that it is not available."""
        return None

    def half_dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """The half types whose products it takes as such on this device; the others compute in
        float32."""
        return HALF_DTYPES if device.type == "cuda" else ()

    def compiles(self, device: torch.device) -> bool:
        """Whether calls on this device may have to compile something first."""
        return False

    def compile_ahead(self, step: Callable[[], object], like: Tensor) -> int:
        """Compile what ``step`` launches on the device of ``like``, launching nothing of it: its
        results mean nothing. Returns how many kernels."""
        return 0

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
        """A small batch in one call: its loss, and for an upstream gradient of 1 the gradients of
        the bases, of ``mixing`` and of the scale; None where the passes are to be taken.

        Args:
            terms: the loss, of the reduction ``"mean"`` or ``"sum"``.
            needs_grad: of each base, of ``mixing``, of the scale; some are needed.
        """
        return None

    # --- Over blocks ------------------------------------------------------------------------------

    def block_rows(self, z: Tensor) -> int:
        """The largest number of rows of a block of these embeddings."""
        raise NotImplementedError

    def stats_block_rows(self, z: Tensor) -> int:
        """The same of a block of which nothing is made but statistics: another number only where no
        tile stays between the passes."""
        return self.block_rows(z)

    def fused_block_rows(self, z: Tensor, num_views: int) -> int:
        """The largest number of samples of a block's side, for views made of these bases."""
        raise NotImplementedError

    def fused_stats_block_rows(self, z: Tensor, num_views: int) -> int:
        """The same where nothing is made but statistics."""
        return self.fused_block_rows(z, num_views)

    def block_stats(
        self, problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
    ) -> None:
        """Fold one block into the running statistics of its rows and columns (``cols`` is
        ``rows``' own object where the problem is square)."""
        raise NotImplementedError

    def block_weights(
        self, problem: Problem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
    ) -> Tensor:
        """``H`` of one block, in the compute dtype, valid until the next call with this workspace;
        or in the accumulation dtype, for ``add_product`` to round.

        A row without a negative has ``lse = inf``: every weight in it is then zero. A kept tile is
        what ``block_stats`` left, and stays as it is.
        """
        raise NotImplementedError

    def fused_block_stats(
        self,
        problem: FusedProblem,
        block: Block,
        rows: RowStats,
        cols: RowStats,
        workspace: Workspace,
    ) -> None:
        """As ``block_stats``, of a block over samples: the statistics of its rows' and columns'
        views."""
        raise NotImplementedError

    def fused_block_weights(
        self, problem: FusedProblem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
    ) -> Tensor:
        """``F`` [2, 2, P, Q] of one block over samples, as ``block_weights``; its share of ``U`` is
        added to the lines' ``inner``: see ``roads.fused``."""
        raise NotImplementedError

    def write_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """``out = a @ b`` in ``out``'s dtype, which is float32 for half operands (CUDA only)."""
        if a.dtype in HALF_DTYPES:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out=out)

    def add_product(self, accumulator: Tensor, a: Tensor, b: Tensor) -> None:
        """``accumulator += a @ b``, likewise; of matrices, or of batches of them."""
        batched = a.dim() == 3
        if a.dtype in HALF_DTYPES:
            add = torch.baddbmm if batched else torch.addmm
            add(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
        elif batched:
            accumulator.baddbmm_(a, b)
        else:
            accumulator.addmm_(a, b)

    def fused_products(self, problem: FusedProblem, block: Block, workspace: Workspace) -> Tensor:
        """``y_bc = <z_b^j, z_c^k>`` of a block over samples: [2, 2, P, Q], in its kept tile or in
        workspace slot 0."""
        y = workspace.kept(block)
        if y is None:
            y = workspace.tile(0, (2, 2, *block.shape), problem.accum_dtype)
        for b in range(2):
            for c in range(2):
                if block.diagonal and b > c:
                    y[b, c].copy_(y[c, b].t())
                    continue
                z_cols = problem.z_cols[c, block.cols]
                self.write_product(y[b, c], problem.z_rows[b, block.rows], z_cols.t())
        return y

    # --- Whole passes -----------------------------------------------------------------------------

    def statistics(self, problem: Problem, plan: tuple[Block, ...], kept: Tensor) -> Tensor | None:
        """``neg_lse``, [M] or [V, N], of all rows of a square problem in one call. None: block by
        block."""
        return None

    def matrix_gradient(
        self,
        problem: Problem,
        plan: tuple[Block, ...],
        kept: Tensor,
        neg_lse: Tensor,
        grad: Tensor,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor, Tensor] | None:
        """``sums`` and ``inner`` of :class:`Lines` of a square problem in one call. None: block by
        block.

        Args:
            neg_lse, grad: as ``statistics`` returns it, and its gradient, contiguous.
            needs_grad: of each base, of ``mixing``, of the scale.
        """
        return None

    # --- Over embeddings --------------------------------------------------------------------------

    def embed(
        self,
        bases: Sequence[Tensor],
        mixing: Tensor | None,
        scale: Tensor,
        spec: NegativesSpec,
    ) -> tuple[Embedded, Tensor]:
        """Unit vectors, and own-sample logits [V, V, N], ``ABSENT`` where not asked for.

        An infinite embedding gives NaN: as it is, its logits of -inf would pass for candidates of
        weight zero. A combination of length zero has coefficients of zero.

        Args:
            bases: [N, D] each, of any floating dtype and layout.
            mixing: [V, 2] in the accumulation dtype where views are made of bases, else None.
            scale: 0-d, in the accumulation dtype.
        """
        embedded = Embedded.empty(bases, scale, spec)
        for rows in _chunks(embedded.z):
            part = torch.stack([base[rows].to(scale.dtype) for base in bases])
            if spec.normalize:
                norm = torch.linalg.vector_norm(part, dim=-1)
                for v, base in enumerate(spec.mixed or ()):
                    if base is not None:
                        embedded.lengths[v, rows] = norm[base]
                    elif mixing is not None:
                        # From the sum itself: its length by the law of cosines would cancel.
                        mixed = part[0] * mixing[v, 0] + part[1] * mixing[v, 1]
                        embedded.lengths[v, rows] = torch.linalg.vector_norm(mixed, dim=-1)
                if spec.mixed is None:
                    embedded.lengths[:, rows] = norm
                # 0 * norm turns a length that overflowed to inf into NaN; 1 / inf would silently
                # give zero.
                inverse = norm.clamp_min(NORM_EPS).reciprocal_().add_(norm * 0)
                embedded.inverse[:, rows] = inverse
                part.mul_(inverse.unsqueeze(-1))
            else:
                part.add_(part, alpha=0)
            embedded.z[:, rows] = part
            embedded.dots[..., rows] = _dots(part, spec)
        if mixing is not None:
            _write_coefficients(embedded, mixing, spec)
        _, own, _ = _similarities(embedded, spec)
        return embedded, _mark_absent_(own * scale, spec)

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
        """Gradients of the bases, of ``mixing`` (those that need none: empty) and of the scale.

        A given view whose gradient is not needed is not read from ``sums``: its ``<z, H z>`` is
        missing in the scale's gradient.

        Args:
            sums: [B, N, D] in the accumulation dtype, which may be overwritten.
            inner: [V, 2, N] where views are made of bases, else empty.
            needs_grad: of each base, of ``mixing``, of the scale.
        """
        num_bases, num_samples, _ = embedded.z.shape
        needed = [b for b in range(num_bases) if needs_grad[b]]
        all_at_once = len(needed) == num_bases
        groups = [slice(0, num_bases)] if all_at_once else [slice(b, b + 1) for b in needed]
        shares = sums.new_empty(2 * len(spec.candidates) + 1, num_samples)
        for rows in _chunks(embedded.z):
            exact = _unrounded(bases, embedded, rows, spec)
            part = Embedded(exact, *(of[..., rows] for of in embedded[1:]))
            along = inner[..., rows]
            if spec.mixed is None:
                along = sums.new_zeros(exact.shape[:2])
                for group in groups:
                    torch.sum(sums[group, rows] * exact[group], -1, out=along[group])
            towards = _pulls(part, along, grad_own_logits[..., rows], scale, spec, shares[:, rows])
            for group in groups:
                grad = sums[group, rows].mul_(scale)
                for c in range(num_bases):
                    grad.addcmul_(towards[group, c].unsqueeze(-1), exact[c])
                if spec.normalize:
                    grad.mul_(part.inverse[group].unsqueeze(-1))
        grads = [
            of_base.to(base.dtype, copy=True) if needs else of_base.new_empty(0)
            for of_base, base, needs in zip(sums.unbind(0), bases, needs_grad, strict=False)
        ]
        return [*grads, *sum_shares(shares, needs_grad[-2])]


def sum_shares(shares: Tensor, needs_mixing: bool) -> tuple[Tensor, Tensor]:
    """The gradients of ``mixing`` (empty where not needed) and of the scale from the samples'
    shares [2 V + 1, N]. Two sums: an operator's results share no memory."""
    of_scale = shares[-1].sum()
    if not needs_mixing:
        return shares.new_empty(0), of_scale
    return shares[:-1].sum(1).view(-1, 2), of_scale


def _chunks(z: Tensor) -> list[slice]:
    _, num_samples, dim = z.shape
    elements = _CHUNK_ELEMENTS.get(z.device.type, _CHUNK_ELEMENTS["default"])
    rows = max(1, elements // dim)
    return [slice(at, min(at + rows, num_samples)) for at in range(0, num_samples, rows)]


def _unrounded(
    bases: Sequence[Tensor], embedded: Embedded, rows: slice, spec: NegativesSpec
) -> Tensor:
    """Rows of all z in the accumulation dtype: ``z`` itself where it holds them exactly, else from
    the bases."""
    if spec.compute_dtype == spec.accum_dtype:
        return embedded.z[:, rows]
    exact = torch.stack([base[rows].to(spec.accum_dtype) for base in bases])
    if spec.normalize:
        return exact.mul_(embedded.inverse[:, rows].unsqueeze(-1))
    return exact.add_(exact, alpha=0)  # like z itself, NaN where the embedding is infinite


def _dots(part: Tensor, spec: NegativesSpec) -> Tensor:
    """Own-sample similarities [B, B, n] of the pairs of bases that are needed, else zero."""
    num_bases, num_samples, _ = part.shape
    zero = part.new_zeros(num_samples)
    # Of bases b and b + shift for all b at once; the pairs asked for say which shifts.
    shifts = {b - a for a, b in spec.base_pairs}
    of_shift = {
        shift: (part[: num_bases - shift] * part[shift:]).sum(-1).unbind(0) for shift in shifts
    }
    dots = [
        of_shift[abs(a - b)][min(a, b)] if (min(a, b), max(a, b)) in spec.base_pairs else zero
        for a in range(num_bases)
        for b in range(num_bases)
    ]
    return torch.stack(dots).view(num_bases, num_bases, num_samples)


def _write_coefficients(embedded: Embedded, mixing: Tensor, spec: NegativesSpec) -> None:
    """``k_vb = mixing[v,b] |e_b| / |e_v|``; of a base, one and zero."""
    coefficients, lengths = embedded.coefficients, embedded.lengths
    coefficients.copy_(mixing.unsqueeze(-1))
    for v, base in enumerate(spec.bases):
        if spec.normalize and base is None:
            coefficients[v] /= embedded.inverse * lengths[v]
            # A zero vector's are zero; a length of NaN is none, nor is one that overflowed.
            coefficients[v].masked_fill_(lengths[v] <= NORM_EPS, 0).add_(lengths[v] * 0)


def _similarities(embedded: Embedded, spec: NegativesSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """``<z_v, z_b>`` [V, B, N] and ``<z_v, z_w>`` [V, V, N] of one sample; and, where a view is
    paired with itself, which vectors have unit length [N, V]."""
    k, toward = embedded.coefficients, embedded.dots
    own = toward
    if spec.mixed is not None:
        toward = (k.unsqueeze(2) * embedded.dots).sum(1)
        own = (toward.unsqueeze(1) * k).sum(2)
    if not (spec.normalize and spec.pairs_itself):
        return toward, own, None
    # Exactly one: as a sum of products its rounding grows with the square of the coefficients.
    unit = (embedded.lengths > NORM_EPS).t()
    own = own.clone() if own is toward else own
    own.diagonal().masked_fill_(unit, 1)
    return toward, own, unit


def _mark_absent_(own_logits: Tensor, spec: NegativesSpec) -> Tensor:
    """``own_logits`` [V, V, N] with ``ABSENT`` where the pair was not asked for."""
    views = range(own_logits.shape[0])
    absent = [(a, b) for a in views for b in views if (min(a, b), max(a, b)) not in spec.own_pairs]
    if absent == [(a, a) for a in views]:
        own_logits.diagonal().fill_(ABSENT)  # the default: one call, where calls are the cost
    else:
        for a, b in absent:
            own_logits[a, b].fill_(ABSENT)
    return own_logits


def _pulls(
    part: Embedded,
    inner: Tensor,
    grad_own_logits: Tensor,
    scale: Tensor,
    spec: NegativesSpec,
    shares: Tensor,
) -> Tensor:
    """The O(N) side of the gradient: ``Q_bc`` [B, B, N]; to ``shares`` [2 V + 1, N] those of the
    gradients of ``mixing`` and of the scale.

    Args:
        inner: ``<(H z)_v, u_v>`` of given views [V, N], or ``U_vb`` [V, 2, N].
    """
    toward, own, unit = _similarities(part, spec)
    longer = part.lengths > NORM_EPS
    grad_own = grad_own_logits * scale
    pull = grad_own + grad_own.transpose(0, 1)
    if unit is not None:
        # A unit vector's similarity to itself is a constant; where the pair was not asked for
        # there is no gradient.
        pull.diagonal().masked_fill_(unit, 0)
    of_own = (grad_own_logits * own).sum((0, 1))
    if spec.mixed is None:
        torch.add(of_own, inner.sum(0), alpha=0.5, out=shares[-1])
        if spec.normalize:
            along = (pull * own).sum(1).addcmul_(inner, scale).mul_(longer)
            pull.diagonal().sub_(along.t())
        return pull
    k = part.coefficients
    torch.add(of_own, (k * inner).sum((0, 1)), alpha=0.5, out=shares[-1])
    # <G_v, u_b>; of a view that is a base only its own entry is used, and only that is filled.
    along_bases = (pull.unsqueeze(2) * toward).sum(1).addcmul_(inner, scale)
    mixed = (pull.unsqueeze(2) * k).sum(1)
    if spec.normalize:
        along = (k * along_bases).sum(1).mul_(longer)
        mixed.addcmul_(along.unsqueeze(1), k, value=-1)
        along_bases.addcmul_(along.unsqueeze(1), toward, value=-1)
        ratio = (part.lengths.unsqueeze(1) * part.inverse).reciprocal_()
        along_bases.mul_(ratio.where(longer.unsqueeze(1), 0))
    for v, base in enumerate(spec.bases):
        if base is not None:
            along_bases[v].zero_()  # a constant
    shares[:-1] = along_bases.flatten(0, 1)
    return (k.unsqueeze(2) * mixed.unsqueeze(1)).sum(0)
