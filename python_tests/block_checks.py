"""Block functions of the backends of GPU kernels against their definitions in dense float64.

A backend runs on a GPU where there is one; else Triton's kernels in Triton's interpreter, CUDA's on
an emulated GPU. ``test_kernels`` holds what every such backend must do, ``test_triton`` and
``test_cuda_host`` what is one backend's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from interpreter import HAS_TRITON, INTERPRETED
from torch import Tensor

from gcl_kernels.backends import cuda
from gcl_kernels.backends.base import Backend
from gcl_kernels.blocks import Block, Samples, plan_blocks, plan_rectangle
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.problem import FusedProblem, Lines, Problem, Workspace, allows_tf32, empty_stats
from gcl_kernels.spec import BoolTable

EMULATED = cuda._cuda is not None and cuda._cuda.device_type == "cpu"


@dataclass(frozen=True)
class Kernels:
    """A backend and where its kernels run.

    Attributes:
        available: whether they run in this process at all.
        rounding: largest relative error of rounding weights to a compute dtype.
    """

    name: str
    backend: Backend
    device: str
    available: bool
    rounding: dict[torch.dtype, float]


TRITON = Kernels(
    "triton",
    BACKENDS["triton"],
    "cpu" if INTERPRETED else "cuda",
    HAS_TRITON and (INTERPRETED or torch.cuda.is_available()),
    # The interpreter cuts bfloat16 off.
    {torch.float32: 0.0, torch.bfloat16: 2.0 ** (-7 if INTERPRETED else -8), torch.float16: 2**-11},
)
CUDA = Kernels(
    "cuda",
    BACKENDS["cuda"],
    "cpu" if EMULATED else "cuda",
    BACKENDS["cuda"].why_unavailable() is None,
    {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11},
)

UNIT = 2.0**-24

# --- Problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Random embeddings; of a fused problem, two bases and random combinations of them.

    Attributes:
        block_rows: the largest number of rows of a block; of a fused problem, of samples.
        ids: half as many as samples, instead of the default ids.
        bases: of a fused problem, as there.
        signs: of a fused problem, coefficients may be negative (a difference of embeddings).
        options: of ``"log_weights"`` and ``"limits"`` those that there are.
    """

    num_samples: int
    dim: int
    scale: float
    candidates: BoolTable = ((True,) * 3,) * 3
    block_rows: int = 4096
    ids: bool = False
    unit_rows: bool = True
    bases: tuple[int | None, ...] = (0, 1, None)
    signs: bool = False
    options: tuple[str, ...] = ()

    @property
    def plan(self) -> tuple[Block, ...]:
        return plan_blocks(self.num_samples, self.candidates, self.block_rows)

    @property
    def fused_plan(self) -> tuple[Block, ...]:
        return plan_blocks(self.num_samples, ((True,),), self.block_rows)


TWO_VIEWS: BoolTable = ((False, True), (True, False))
ONE_SIDED: BoolTable = ((True, True, False), (False, True, True), (False, False, False))
CYCLE: BoolTable = ((False, True, False), (False, False, True), (True, False, False))

CASES = {
    "one block, bounded": Case(37, 40, 20.0),
    "one block, running maximum": Case(37, 40, 100.0),
    "bounded at the limit": Case(30, 24, 40.0),
    "a dimension of one": Case(25, 1, 10.0),
    "rows not aligned": Case(45, 67, 50.0, block_rows=96),
    "whole tiles": Case(64, 64, 30.0, block_rows=64),
    "several tiles": Case(110, 64, 30.0),
    "several tiles, running maximum": Case(95, 104, 60.0, ids=True),
    "many blocks": Case(70, 32, 14.0, block_rows=48),
    "ids": Case(50, 33, 100.0, ids=True, block_rows=80),
    "two views, off the diagonal": Case(135, 48, 100.0, candidates=TWO_VIEWS),
    "one-sided candidates": Case(41, 40, 20.0, candidates=ONE_SIDED),
    "one-sided, no bound": Case(41, 40, 60.0, candidates=CYCLE, block_rows=32, ids=True),
    "not normalised": Case(40, 20, 3.0, unit_rows=False, block_rows=64),
    "some tiles of a wide range": Case(110, 24, 75.0),
    "a wide range": Case(45, 16, 3000.0, ids=True),
    "weights": Case(50, 33, 20.0, options=("log_weights",), block_rows=80),
    "limits": Case(50, 33, 20.0, options=("limits",), ids=True),
    "weights and limits": Case(
        45, 40, 60.0, candidates=ONE_SIDED, options=("log_weights", "limits"), block_rows=64
    ),
}
FUSED_CASES = {
    "one block, bounded": Case(37, 40, 20.0),
    "one block, running maximum": Case(37, 40, 100.0, signs=True),
    "bounded at the limit": Case(30, 24, 40.0),
    "one sample": Case(1, 8, 20.0),
    "two samples": Case(2, 8, 60.0, signs=True),
    "a dimension of one": Case(25, 1, 10.0, signs=True),
    "rows not aligned": Case(75, 67, 50.0, block_rows=48),
    "whole tiles": Case(96, 64, 30.0, block_rows=64),
    "several tiles": Case(110, 64, 30.0, signs=True),
    "many blocks": Case(110, 32, 14.0, block_rows=48, signs=True),
    "ids": Case(70, 32, 100.0, ids=True, block_rows=48),
    "ids, bounded": Case(70, 32, 30.0, ids=True),
    "two views, off the diagonal": Case(75, 48, 100.0, bases=(0, 1), candidates=TWO_VIEWS),
    "views in another order": Case(45, 20, 60.0, bases=(None, 1, 0), signs=True),
    "one-sided candidates": Case(41, 40, 20.0, candidates=ONE_SIDED),
    "one-sided, no bound": Case(41, 40, 60.0, candidates=CYCLE, block_rows=32, ids=True),
    "no view is its own candidate": Case(
        41, 40, 20.0, candidates=((False, True, True), (True, False, False), (True, False, False)),
    ),
    "four views, two of them combinations": Case(
        60, 24, 80.0, bases=(0, None, 1, None), block_rows=32, signs=True,
        candidates=(
            (True, True, False, True), (True,) * 4, (False, True, True, False), (True,) * 4,
        ),
    ),
    "seven views": Case(
        20, 16, 50.0, bases=(0, 1, *(None,) * 5), signs=True, candidates=((True,) * 7,) * 7
    ),
    "no view is a base": Case(33, 24, 25.0, bases=(None,) * 2, candidates=((True,) * 2,) * 2),
    "not normalised": Case(40, 20, 3.0, unit_rows=False, block_rows=32, signs=True),
    "a wide range": Case(45, 16, 3000.0),
    "weights": Case(70, 32, 20.0, options=("log_weights",), block_rows=48),
    "limits": Case(70, 32, 20.0, options=("limits",), ids=True, signs=True),
    "weights and limits": Case(
        41, 40, 60.0, candidates=CYCLE, options=("log_weights", "limits"), block_rows=32
    ),
}  # fmt: skip
FEW = {
    "one block, running maximum", "rows not aligned", "one-sided candidates", "several tiles",
    "weights and limits",
}  # fmt: skip
"""Cases that pass through every part of a kernel that the compute dtype has an effect on."""


def random_ids(case: Case, generator: torch.Generator) -> Tensor | None:
    if not case.ids:
        return None
    # In 32 bits they would be others.
    return torch.randint(0, case.num_samples // 2, (case.num_samples,), generator=generator) - 2**40


def random_unit(shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=-1) if case.unit_rows else z


def add_options(problem: Problem, case: Case, generator: torch.Generator) -> Problem:
    """Log weights, one of twelve -inf, and limits that leave out some and for some anchors all."""
    shape = len(case.candidates), case.num_samples
    drawn = {
        "log_weights": 2 * torch.randn(shape, generator=generator),
        "limits": case.scale * (0.3 + torch.randn(shape, generator=generator) / 2),
    }
    drawn["log_weights"].view(-1)[::12] = -torch.inf
    for name in case.options:
        lines = drawn[name].to(problem.z_rows.device)
        lines = lines if isinstance(problem, FusedProblem) else lines.flatten()
        for side in ("rows", "cols"):
            setattr(problem, f"{name}_{side}", lines)
    return problem


def make_problem(kernels: Kernels, case: Case, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(case.num_samples + case.dim)
    num_views = len(case.candidates)
    z = random_unit((num_views * case.num_samples, case.dim), case, generator)
    z = z.to(kernels.device, dtype)
    ids = random_ids(case, generator)
    if ids is not None:
        ids = ids.repeat(num_views).to(kernels.device)
    scale = torch.tensor(case.scale, dtype=torch.float32, device=kernels.device)
    problem = Problem(z, z, ids, ids, scale, None, case.unit_rows)
    return add_options(problem, case, generator)


def fused_problem(kernels: Kernels, case: Case, dtype: torch.dtype) -> FusedProblem:
    generator = torch.Generator().manual_seed(case.num_samples + case.dim)
    n, num_views = case.num_samples, len(case.candidates)
    z = random_unit((2, n, case.dim), case, generator).to(dtype)
    coefficients = torch.zeros(num_views, 2, n)
    for v, base in enumerate(case.bases[:num_views]):
        if base is not None:
            coefficients[v, base] = 1
            continue
        draw = torch.randn if case.signs else torch.rand
        mixing = draw(2, n, generator=generator, dtype=torch.float64)
        length = torch.einsum("bj,bjd->jd", mixing, z.double()).norm(dim=-1)
        coefficients[v] = mixing / length if case.unit_rows else mixing
        coefficients[v, :, 3:4] = 0  # a fused vector of length zero
    ids = random_ids(case, generator)
    z, coefficients = z.to(kernels.device), coefficients.to(kernels.device)
    ids = None if ids is None else ids.to(kernels.device)
    scale = torch.tensor(case.scale, dtype=torch.float32, device=kernels.device)
    of_views = coefficients, coefficients, case.bases[:num_views], case.candidates
    problem = FusedProblem(z, z, ids, ids, scale, None, case.unit_rows, *of_views)
    return add_options(problem, case, generator)


def random_grad(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Positive and negative, and large enough that no weight of a half type is subnormal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device) * 64


# --- Definitions ---------------------------------------------------------------------------------


def negatives(candidates: BoolTable, ids: Tensor | None, num_samples: int) -> Tensor:
    """[V, N, V, N], true where a column is a negative of the row."""
    ids = torch.arange(num_samples) if ids is None else ids[:num_samples]
    table = torch.tensor(candidates, device=ids.device)
    return table[:, None, :, None] & (ids[:, None] != ids[None, :])[None, :, None, :]


def multiplied(z: Tensor) -> Tensor:
    """What the products take for ``z``: where PyTorch allows TF32, the nearest of 11 bits."""
    if z.dtype != torch.float32 or not allows_tf32():
        return z
    return ((z.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def logits(problem: Problem, dtype: torch.dtype) -> Tensor:
    """[M, M], of a fused problem [V, N, V, N]."""
    z = multiplied(problem.z_rows).to(dtype)
    if isinstance(problem, FusedProblem):
        z = torch.einsum("vbj,bjd->vjd", problem.coefficients_rows.to(dtype), z)
        return problem.scale.to(dtype) * torch.einsum("vjd,wkd->vjwk", z, z)
    return problem.scale.to(dtype) * (z @ z.T)


def of_anchors(lines: Tensor) -> Tensor:
    """What there is of each anchor, beside its logits."""
    return lines.view(*lines.shape, *(1,) * lines.dim())


def chosen(problem: Problem, mask: Tensor) -> Tensor:
    """Of negatives, those that have a weight and lie within the anchor's limit."""
    if problem.log_weights_rows is not None:
        mask = mask & (problem.log_weights_rows > -torch.inf)
    if problem.limits_rows is not None:
        mask = mask & ~(logits(problem, torch.float64) > of_anchors(problem.limits_rows))
    return mask


def terms_of(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The logits with the candidates' log weights."""
    x = logits(problem, dtype)
    return x if problem.log_weights_rows is None else x + problem.log_weights_rows


def dense(
    problem: Problem, mask: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """neg_lse [M] and H [M, M], computed in ``dtype`` from the rounded embeddings."""
    x = terms_of(problem, dtype)
    lse = x.masked_fill(~mask, -torch.inf).logsumexp(1)
    weights = torch.where(mask, grad.to(dtype)[:, None] * (x - lse[:, None]).exp(), 0)
    return lse, weights + weights.T


@dataclass
class FusedDense:
    """neg_lse [V, N], F [2, 2, N, N] and U [V, 2, N] by their definitions; and under ``*_terms``
    the sums of the absolute values of what each entry of F and U adds."""

    lse: Tensor
    f: Tensor
    inner: Tensor
    f_terms: Tensor
    inner_terms: Tensor


def fused_dense(
    problem: FusedProblem, mask: Tensor, grad: Tensor, dtype: torch.dtype
) -> FusedDense:
    z, k = multiplied(problem.z_rows).to(dtype), problem.coefficients_rows.to(dtype)
    views = torch.einsum("vbj,bjd->vjd", k, z)
    x = terms_of(problem, dtype)
    lse = x.masked_fill(~mask, -torch.inf).flatten(2).logsumexp(2)
    h = torch.where(mask, grad.to(dtype)[..., None, None] * (x - lse[..., None, None]).exp(), 0)
    h = h + h.permute(2, 3, 0, 1)
    towards = torch.einsum("bjd,wkd->bjwk", z, views)
    return FusedDense(
        lse,
        torch.einsum("vbj,wck,vjwk->bcjk", k, k, h),
        torch.einsum("vjwk,bjwk->vbj", h, towards),
        torch.einsum("vbj,wck,vjwk->bcjk", k.abs(), k.abs(), h.abs()),
        torch.einsum("vjwk,bjwk->vbj", h.abs(), towards.abs()),
    )


def lines_of(lse: Tensor, grad: Tensor, inner: Tensor | None = None) -> Lines:
    """What block functions read of rows or columns; they add to ``inner`` alone."""
    nothing = lse.new_empty(0)
    return Lines(lse, grad, nothing, nothing if inner is None else inner)


# --- Runs over all blocks ------------------------------------------------------------------------


def run_stats(kernels: Kernels, problem: Problem, plan: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
    backend = kernels.backend
    fused = isinstance(problem, FusedProblem)
    block_stats = backend.fused_block_stats if fused else backend.block_stats
    workspace = Workspace(problem.z_rows.device, plan)
    stats = empty_stats(problem, problem.z_rows)
    for block in plan:
        block_stats(problem, block, stats, stats, workspace)
    return stats.max, stats.sum


def run_weights(
    kernels: Kernels, problem: Problem, plan: tuple[Block, ...], lse: Tensor, grad: Tensor
) -> Tensor:
    """All blocks of H in one matrix."""
    h = problem.z_rows.new_zeros((len(lse),) * 2, dtype=torch.float64)
    workspace, lines = Workspace(problem.z_rows.device, plan), lines_of(lse, grad)
    for block in plan:
        part = kernels.backend.block_weights(problem, block, lines, lines, workspace)
        assert part.dtype == problem.compute_dtype and part.shape == block.shape
        h[block.rows, block.cols] = part.double()
        if not block.diagonal:
            h[block.cols, block.rows] = part.double().T
        part.fill_(torch.nan)  # the next block must write all of its own
    return h


def run_fused_weights(
    kernels: Kernels, problem: FusedProblem, plan: tuple[Block, ...], lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """All blocks of F in one [2, 2, N, N], and U."""
    n = problem.z_rows.shape[1]
    f = problem.z_rows.new_full((2, 2, n, n), torch.nan, dtype=torch.float64)
    inner = torch.zeros_like(problem.coefficients_rows)
    workspace, lines = Workspace(problem.z_rows.device, plan), lines_of(lse, grad, inner)
    for block in plan:
        part = kernels.backend.fused_block_weights(problem, block, lines, lines, workspace)
        assert part.dtype == problem.compute_dtype and part.shape == (2, 2, *block.shape)
        f[:, :, block.rows, block.cols] = part.double()
        if not block.diagonal:
            f[:, :, block.cols, block.rows] = part.double().permute(1, 0, 3, 2)
        part.fill_(torch.nan)
    return f, inner


def results(kernels: Kernels, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of both block functions."""
    problem = make_problem(kernels, case, dtype)
    maxima, sums = run_stats(kernels, problem, case.plan)
    lse = torch.where(sums > 0, sums.log() + maxima, torch.inf)
    grad = random_grad(lse.shape, lse.device)
    return maxima, sums, run_weights(kernels, problem, case.plan, lse, grad)


def fused_results(kernels: Kernels, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    problem, plan = fused_problem(kernels, case, dtype), case.fused_plan
    maxima, sums = run_stats(kernels, problem, plan)
    lse = torch.where(sums > 0, sums.log() + maxima, torch.inf)
    grad = random_grad(lse.shape, lse.device)
    return maxima, sums, *run_fused_weights(kernels, problem, plan, lse, grad)


# --- Checks --------------------------------------------------------------------------------------


def error(value: Tensor, expected: Tensor) -> float:
    difference = torch.where(value == expected, 0, value.double() - expected)  # also -inf
    finite = expected.masked_fill(expected.isinf(), 0)
    return float(difference.norm() / finite.norm().clamp_min(1e-30))


def rounding(case: Case, terms: float = 0.0) -> float:
    """Of four roundings of numbers as large as a logit (x, lse, and both in base 2), each a
    relative error of exp(x - lse).

    Args:
        terms: of a fused problem, the largest sum of a view's absolute coefficients, squared: a
            logit has four terms, which cancel where embeddings are subtracted.
    """
    largest = case.scale if case.unit_rows else case.scale * 4 * case.dim * max(terms, 1.0)
    return (4 + 2 * terms) * max(largest, 1.0) * UNIT


def check_stats(stats: tuple[Tensor, Tensor], exact: Tensor, single: Tensor, allowed: float):
    maxima, sums = stats
    assert torch.equal(sums > 0, exact > -torch.inf)
    assert maxima.isfinite().all()
    assert error(sums.log() + maxima, exact) <= 2 * error(single, exact) + allowed


def check_block_functions(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    problem, plan = make_problem(kernels, case, dtype), case.plan
    mask = negatives(case.candidates, problem.ids_rows, case.num_samples).to(kernels.device)
    mask = chosen(problem, mask.reshape((problem.z_rows.shape[0],) * 2))
    grad = random_grad(mask.shape[:1], mask.device) * mask.any(1)
    lse64, h64 = dense(problem, mask, grad, torch.float64)
    lse32, h32 = dense(problem, mask, grad, torch.float32)
    check_stats(run_stats(kernels, problem, plan), lse64, lse32, rounding(case))

    # From the exact lse, so that an error of the other function does not hide here.
    given = lse64.masked_fill(~mask.any(1), torch.inf).float()
    h = run_weights(kernels, problem, plan, given, grad)
    assert error(h, h64) <= 2 * error(h32, h64) + rounding(case) + kernels.rounding[dtype]


def check_fused_block_functions(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    problem, plan = fused_problem(kernels, case, dtype), case.fused_plan
    mask = negatives(case.candidates, problem.ids_rows, case.num_samples).to(kernels.device)
    mask = chosen(problem, mask)
    has_negative = mask.flatten(2).any(2)
    grad = random_grad(has_negative.shape, mask.device) * has_negative
    exact, single = (
        fused_dense(problem, mask, grad, kind) for kind in (torch.float64, torch.float32)
    )
    allowed = rounding(case, problem.coefficients_rows.abs().sum(1).max().item() ** 2)
    stats = run_stats(kernels, problem, plan)
    check_stats(stats, exact.lse, single.lse, allowed)

    given = exact.lse.masked_fill(~has_negative, torch.inf).float()
    f, inner = run_fused_weights(kernels, problem, plan, given, grad)

    check_fused_weights(kernels, problem, dtype, f, inner, exact, single, allowed)


def check_fused_weights(
    kernels: Kernels,
    problem: FusedProblem,
    dtype: torch.dtype,
    f: Tensor,
    inner: Tensor,
    exact: FusedDense,
    single: FusedDense,
    allowed: float,
    samples: tuple[slice, slice] = (slice(None), slice(None)),
) -> None:
    """``F`` of these samples as rows and columns, and ``U`` of all samples, against the whole's."""
    there = (..., *samples)

    def share(got: Tensor, expected: Tensor, terms: Tensor) -> float:
        return float((got.double() - expected).norm() / terms.norm().clamp_min(1e-30))

    exact_f, terms = exact.f[there], exact.f_terms[there]
    allowed_f = 2 * share(single.f[there], exact_f, terms) + allowed + kernels.rounding[dtype]
    assert share(f, exact_f, terms) <= allowed_f

    # A view that is a base has one product that nothing reads: nothing, or what it is.
    bases = torch.tensor([[v is None or v == b for b in range(2)] for v in problem.bases])
    needed = bases.to(kernels.device).unsqueeze(-1) | (inner != 0)
    inner, exact_inner, single_inner = inner * needed, exact.inner * needed, single.inner * needed
    terms = exact.inner_terms * needed
    allowed_inner = 2 * share(single_inner, exact_inner, terms) + allowed
    assert share(inner, exact_inner, terms) <= allowed_inner


# --- Own rows against another process's columns --------------------------------------------------

RECTANGLES = {
    "bounded": Case(90, 40, 20.0),
    "running maximum": Case(90, 40, 100.0, signs=True),
    "several blocks": Case(110, 24, 30.0, block_rows=32),
    "ids": Case(70, 33, 100.0, ids=True, block_rows=48),
    "two views, off the diagonal": Case(
        75, 48, 60.0, candidates=TWO_VIEWS, bases=(0, 1), block_rows=32
    ),
    "one-sided candidates": Case(61, 40, 20.0, candidates=ONE_SIDED, block_rows=64),
    "weights and limits": Case(
        61, 40, 20.0, candidates=ONE_SIDED, block_rows=64, options=("log_weights", "limits")
    ),
}


def _of_samples(lines: Tensor, num_views: int, samples: slice) -> Tensor:
    """Those of some samples, of lines [V * N, ...]."""
    return lines.unflatten(0, (num_views, -1))[:, samples].flatten(0, 1).contiguous()


def cut_options(
    problem: Problem,
    square: Problem,
    cut: Callable[[Tensor, slice], Tensor],
    sides: tuple[slice, slice],
) -> None:
    """Give a rectangle's rows and columns their part of the square's options."""
    for name in ("log_weights", "limits"):
        whole = getattr(square, f"{name}_rows")
        for side, samples in zip(("rows", "cols"), sides, strict=True):
            setattr(problem, f"{name}_{side}", None if whole is None else cut(whole, samples))


def check_rectangle(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    """The first third of the samples as rows, the others as columns."""
    square, views = make_problem(kernels, case, dtype), len(case.candidates)
    sides = slice(0, case.num_samples // 3), slice(case.num_samples // 3, None)
    z = [_of_samples(square.z_rows, views, side) for side in sides]
    ids = [
        None if square.ids_rows is None else _of_samples(square.ids_rows, views, side)
        for side in sides
    ]
    problem = replace(square, z_rows=z[0], z_cols=z[1], ids_rows=ids[0], ids_cols=ids[1])
    cut_options(problem, square, lambda lines, side: _of_samples(lines, views, side), sides)
    mask = negatives(case.candidates, square.ids_rows, case.num_samples).to(kernels.device)
    mask = chosen(square, mask.reshape((square.z_rows.shape[0],) * 2)).view(mask.shape)
    by_row, by_col = (
        [
            terms_of(square, kind).view(mask.shape)[:, first, :, second].flatten(2).flatten(0, 1)
            for kind in (torch.float64, torch.float32)
        ]
        for first, second in (sides, sides[::-1])
    )
    of_rows = mask[:, sides[0], :, sides[1]].flatten(2).flatten(0, 1)
    of_cols = mask[:, sides[1], :, sides[0]].flatten(2).flatten(0, 1)
    samples = [Samples(0, len(side) // views, len(side) // views) for side in z]
    plan = plan_rectangle(*samples, case.candidates, case.block_rows)
    workspace = Workspace(z[0].device, plan)
    stats = [empty_stats(problem, side) for side in z]
    for block in plan:
        kernels.backend.block_stats(problem, block, *stats, workspace)
    for of_side, served, terms in zip(stats, (of_rows, of_cols), (by_row, by_col), strict=True):
        lse, lse32 = (values.masked_fill(~served, -torch.inf).logsumexp(1) for values in terms)
        check_stats((of_side.max, of_side.sum), lse, lse32, rounding(case))

    # Any lse above the logits' will do, and other rows' are among them.
    lse = [random_grad(side.shape[:1], side.device).abs() / 64 + problem.scale for side in z]
    grad = [random_grad(side.shape[:1], side.device) for side in z]

    def weights(kind: int) -> Tensor:
        of_side = (
            torch.where(served, (terms[kind] - lse_p[:, None]).exp() * grad_p[:, None], 0)
            for served, terms, lse_p, grad_p in zip(
                (of_rows, of_cols), (by_row, by_col), lse, grad, strict=True
            )
        )
        return next(of_side) + next(of_side).T

    h, lines = torch.zeros_like(by_row[0]), list(map(lines_of, lse, grad))
    for block in plan:
        part = kernels.backend.block_weights(problem, block, *lines, workspace)
        h[block.rows, block.cols] = part.double()
        part.fill_(torch.nan)
    exact = weights(0)
    allowed = 2 * error(weights(1), exact) + rounding(case) + kernels.rounding[dtype]
    assert error(h, exact) <= allowed


def check_fused_rectangle(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    """As :func:`check_rectangle`: the part of the whole's results that lies there."""
    square = fused_problem(kernels, case, dtype)
    n = case.num_samples
    sides = slice(0, n // 3), slice(n // 3, n)
    z = [square.z_rows[:, side].contiguous() for side in sides]
    coefficients = [square.coefficients_rows[..., side].contiguous() for side in sides]
    ids = [None if square.ids_rows is None else square.ids_rows[side] for side in sides]
    problem = replace(
        square,
        z_rows=z[0],
        z_cols=z[1],
        coefficients_rows=coefficients[0],
        coefficients_cols=coefficients[1],
        ids_rows=ids[0],
        ids_cols=ids[1],
    )
    cut_options(problem, square, lambda lines, side: lines[:, side].contiguous(), sides)
    # In the whole, pairs of one side are masked: what is left of it is the rectangle.
    mask = negatives(case.candidates, square.ids_rows, n).to(kernels.device)
    for side in sides:
        mask[:, side, :, side] = False
    mask = chosen(square, mask)
    has_negative = mask.flatten(2).any(2)
    grad = random_grad(has_negative.shape, mask.device) * has_negative
    exact, single = (
        fused_dense(square, mask, grad, kind) for kind in (torch.float64, torch.float32)
    )
    allowed = rounding(case, square.coefficients_rows.abs().sum(1).max().item() ** 2)
    samples = [Samples(0, side.stop - side.start, side.stop - side.start) for side in sides]
    plan = plan_rectangle(*samples, ((True,),), case.block_rows)
    workspace = Workspace(z[0].device, plan)
    stats = [empty_stats(problem, side) for side in z]
    for block in plan:
        kernels.backend.fused_block_stats(problem, block, *stats, workspace)
    whole = torch.cat([of.max for of in stats], 1), torch.cat([of.sum for of in stats], 1)
    check_stats(whole, exact.lse, single.lse, allowed)

    given = exact.lse.masked_fill(~has_negative, torch.inf).float()
    lse = [given[:, side].contiguous() for side in sides]
    grads = [grad[:, side].contiguous() for side in sides]
    inner = [torch.zeros_like(of) for of in coefficients]
    lines = list(map(lines_of, lse, grads, inner))
    f = exact.f.new_full((2, 2, n // 3, n - n // 3), torch.nan)
    for block in plan:
        part = kernels.backend.fused_block_weights(problem, block, *lines, workspace)
        f[:, :, block.rows, block.cols] = part.double()
        part.fill_(torch.nan)

    check_fused_weights(
        kernels, problem, dtype, f, torch.cat(inner, 2), exact, single, allowed, sides
    )
