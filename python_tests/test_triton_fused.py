"""The Triton kernels of fused views against dense float64, block functions first.

Without a GPU they run in Triton's interpreter: ``test_in_the_interpreter``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from interpreter import (
    DEVICE,
    INTERPRETED,
    ROUNDING,
    UNIT,
    checked_memory,
    error,
    interpreted_bfloat16,
    run_file,
    runs,
    starts,
)
from torch import Tensor

import gcl_kernels
from gcl_kernels.backends import triton as backend
from gcl_kernels.backends.triton import tiles
from gcl_kernels.blocks import Block, plan_blocks
from gcl_kernels.problem import FusedProblem, Workspace
from gcl_kernels.spec import BoolTable

__all__ = ["interpreted_bfloat16"]  # a fixture of this module

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's memory")


@starts
def test_in_the_interpreter():
    run_file(__file__)


# --- Without Triton ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(tiles.FUSED_TILES), ids="-".join)
def test_every_row_of_the_table_fits_its_chip(key):
    chip, tile = tiles.CHIPS[key[0]], tiles.FUSED_TILES[key]
    assert tile.bases == 2
    assert tile.shared_bytes(chip) <= chip.shared_bytes
    assert (2 * tile.size) ** 2 / (chip.lanes * tile.warps) <= 64, "sums of a thread"
    assert tile.size // 4 >= 8, "places of a quarter of the columns"
    assert len(tile.reason) > 10


def test_the_tables_have_the_same_rows():
    assert tiles.FUSED_TILES.keys() == tiles.TILES.keys()


def test_tile_choice():
    chip = tiles.CHIPS["sm_90"]
    assert tiles.pick_tile(chip, False, 512, 4096, 4096, False, fused=True).size == 64
    assert tiles.pick_tile(chip, False, 512, 256, 256, True, fused=True).size == 32
    assert tiles.pick_tile(chip, True, 512, 4096, 4096, False, fused=True).slice_bytes == 64


# --- Block functions -----------------------------------------------------------------------------

GCL = (0, 1, None)


@dataclass(frozen=True)
class Case:
    """``signs``: whether coefficients may be negative (a difference of embeddings)."""

    num_samples: int
    dim: int
    scale: float
    bases: tuple[int | None, ...] = GCL
    candidates: BoolTable = ((True,) * 3,) * 3
    block_rows: int = 4096
    ids: bool = False
    unit_rows: bool = True
    signs: bool = False


CASES = {
    "one block, bounded": Case(37, 40, 20.0),
    "one block, running maximum": Case(37, 40, 100.0, signs=True),
    "bounded at the limit": Case(30, 24, 40.0),
    "a dimension of one": Case(25, 1, 10.0, signs=True),
    "dimension no multiple of 8": Case(75, 67, 50.0, block_rows=48),
    "aligned": Case(128, 64, 30.0, block_rows=64),
    "many blocks": Case(150, 32, 14.0, block_rows=48, signs=True),
    "ids": Case(90, 32, 100.0, ids=True, block_rows=48),
    "ids, bounded": Case(70, 32, 30.0, ids=True),
    "two views, off the diagonal": Case(
        75, 48, 100.0, bases=(0, 1), candidates=((False, True), (True, False)),
    ),
    "views in another order": Case(45, 20, 60.0, bases=(None, 1, 0), signs=True),
    "one-sided candidates": Case(
        41, 40, 20.0, candidates=((True, True, False), (False, True, True), (False, False, False)),
    ),
    "one-sided, no bound": Case(
        41, 40, 60.0, candidates=((False, True, False), (False, False, True), (True, False, False)),
        block_rows=32, ids=True,
    ),
    "four views, two of them combinations": Case(
        60, 24, 80.0, bases=(0, None, 1, None), block_rows=32, signs=True,
        candidates=(
            (True, True, False, True), (True,) * 4, (False, True, True, False), (True,) * 4,
        ),
    ),
    "no view is a base": Case(33, 24, 25.0, bases=(None,) * 2, candidates=((True,) * 2,) * 2),
    "not normalised": Case(40, 20, 3.0, unit_rows=False, block_rows=32, signs=True),
}  # fmt: skip


def make_problem(case: Case, dtype: torch.dtype) -> FusedProblem:
    generator = torch.Generator().manual_seed(case.num_samples + case.dim)
    n = case.num_samples
    z = torch.randn(2, n, case.dim, generator=generator, dtype=torch.float64)
    if case.unit_rows:
        z = torch.nn.functional.normalize(z, dim=-1)
    z = z.to(dtype)
    coefficients = torch.zeros(len(case.bases), 2, n)
    for v, base in enumerate(case.bases):
        if base is not None:
            coefficients[v, base] = 1
            continue
        draw = torch.randn if case.signs else torch.rand
        mixing = draw(2, n, generator=generator, dtype=torch.float64)
        length = torch.einsum("bj,bjd->jd", mixing, z.double()).norm(dim=-1)
        coefficients[v] = mixing / length if case.unit_rows else mixing
        coefficients[v, :, 3] = 0  # a fused vector of length zero
    ids = None
    if case.ids:
        ids = torch.randint(0, n // 2, (n,), generator=generator).to(DEVICE)
    scale = torch.tensor(case.scale, dtype=torch.float32, device=DEVICE)
    z, coefficients = z.to(DEVICE), coefficients.to(DEVICE)
    return FusedProblem(
        z, z, coefficients, coefficients, case.bases, case.candidates, ids, ids, scale, None,
        case.unit_rows,
    )  # fmt: skip


def negatives(problem: FusedProblem) -> Tensor:
    """[V, N, V, N], true where a column is a negative of the row."""
    n = problem.z_rows.shape[1]
    ids = torch.arange(n, device=DEVICE) if problem.ids_rows is None else problem.ids_rows
    table = torch.tensor(problem.candidates, device=DEVICE)
    return table[:, None, :, None] & (ids[:, None] != ids[None, :])[None, :, None, :]


@dataclass
class Dense:
    """The definition, and under ``*_terms`` the sums of absolute values of what each entry adds."""

    lse: Tensor
    f: Tensor
    inner: Tensor
    f_terms: Tensor
    inner_terms: Tensor


def dense(problem: FusedProblem, grad: Tensor, dtype: torch.dtype) -> Dense:
    z, k = problem.z_rows.to(dtype), problem.coefficients_rows.to(dtype)
    mask = negatives(problem)
    views = torch.einsum("vbj,bjd->vjd", k, z)
    x = problem.scale.to(dtype) * torch.einsum("vjd,wkd->vjwk", views, views)
    lse = x.masked_fill(~mask, -torch.inf).flatten(2).logsumexp(2)
    h = torch.where(mask, grad.to(dtype)[..., None, None] * (x - lse[..., None, None]).exp(), 0)
    h = h + h.permute(2, 3, 0, 1)
    towards = torch.einsum("bjd,wkd->bjwk", z, views)
    return Dense(
        lse,
        torch.einsum("vbj,wck,vjwk->bcjk", k, k, h),
        torch.einsum("vjwk,bjwk->vbj", h, towards),
        torch.einsum("vbj,wck,vjwk->bcjk", k.abs(), k.abs(), h.abs()),
        torch.einsum("vjwk,bjwk->vbj", h.abs(), towards.abs()),
    )


def filled(bases: tuple[int | None, ...]) -> Tensor:
    """[V, 2, 1]: which of ``inner`` a backend has to fill."""
    table = [[base is None or base == b for b in range(2)] for base in bases]
    return torch.tensor(table, device=DEVICE).unsqueeze(-1)


def run_stats(problem: FusedProblem, plan: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
    workspace = Workspace(problem.z_rows.device, plan)
    stats = backend.fused_start_stats(problem)
    for block in plan:
        backend.fused_block_stats(problem, block, stats, stats, workspace)
    return stats.max, stats.sum


def run_weights(
    problem: FusedProblem, plan: tuple[Block, ...], lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """All blocks of F in one [2, 2, N, N], and inner."""
    n = problem.z_rows.shape[1]
    f = torch.zeros(2, 2, n, n, dtype=torch.float64, device=DEVICE)
    inner = torch.zeros_like(problem.coefficients_rows)
    workspace = Workspace(problem.z_rows.device, plan)
    for block in plan:
        part = backend.fused_block_weights(
            problem, block, lse, lse, grad, grad, inner, inner, workspace
        )
        assert part.dtype == problem.compute_dtype and part.shape == (2, 2, *block.shape)
        f[:, :, block.rows, block.cols] = part.double()
        if not block.diagonal:
            f[:, :, block.cols, block.rows] = part.double().permute(1, 0, 3, 2)
        part.fill_(torch.nan)  # the next block must write all of its own
    return f, inner


def check_block_functions(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    plan = plan_blocks(case.num_samples, ((True,),), case.block_rows)
    has_negative = negatives(problem).flatten(2).any(2)
    generator = torch.Generator().manual_seed(1)
    # Positive and negative, and large enough that no weight of a half type is subnormal.
    grad = torch.randn(has_negative.shape, generator=generator).to(DEVICE) * 64 * has_negative
    exact, single = dense(problem, grad, torch.float64), dense(problem, grad, torch.float32)
    coefficients = problem.coefficients_rows.abs().sum(1).max().item()
    largest = case.scale if case.unit_rows else case.scale * 4 * case.dim * coefficients**2
    # Four roundings of numbers as large as a logit; and of a logit's four terms, which cancel where
    # embeddings are subtracted.
    rounding = (4 + 2 * coefficients**2) * max(largest, 1.0) * UNIT

    maxima, sums = run_stats(problem, plan)
    lse = sums.log() + maxima
    assert torch.equal(sums > 0, has_negative)
    assert maxima.isfinite().all()
    assert error(lse, exact.lse) <= 2 * error(single.lse, exact.lse) + rounding

    given = exact.lse.masked_fill(~has_negative, torch.inf).float()
    f, inner = run_weights(problem, plan, given, grad)

    def share(difference: Tensor, terms: Tensor) -> float:
        return float(difference.double().norm() / terms.norm())

    assert share(f - exact.f.nan_to_num(0), exact.f_terms.nan_to_num(0)) <= (
        2 * share(single.f.nan_to_num(0) - exact.f.nan_to_num(0), exact.f_terms.nan_to_num(0))
        + rounding
        + ROUNDING[dtype]
    )
    wanted = filled(case.bases)
    assert (inner.masked_select(~wanted) == 0).all()
    terms = (exact.inner_terms.nan_to_num(0) * wanted).clamp_min(1e-30)
    expected = exact.inner.nan_to_num(0) * wanted
    assert share(inner - expected, terms) <= (
        2 * share(single.inner.nan_to_num(0) * wanted - expected, terms) + rounding
    )


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_block_functions(name, dtype):
    check_block_functions(CASES[name], dtype)


@runs
@pytest.mark.parametrize("row", ["large", "small", "fma"])
@pytest.mark.parametrize("name", ["dimension no multiple of 8", "ids", "one-sided candidates"])
def test_every_tile_size(name, row, monkeypatch):
    from gcl_kernels.backends.triton import primitives

    tile = tiles.FUSED_TILES["sm_80", row]
    monkeypatch.setattr(primitives, "pick_tile", lambda *arguments: tile)
    check_block_functions(replace(CASES[name], num_samples=150, block_rows=80), torch.float32)


@runs
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("num_samples", [1, 33])
def test_rows_without_a_negative_have_no_weight(num_samples, scale):
    case = Case(33, 16, scale)
    problem = make_problem(case, torch.float32)
    zeros = torch.zeros(33, dtype=torch.int64, device=DEVICE)
    z, k = problem.z_rows[:, :num_samples].contiguous(), problem.coefficients_rows
    k = k[..., :num_samples].contiguous()
    problem = replace(problem, z_rows=z, z_cols=z, coefficients_rows=k, coefficients_cols=k)
    if num_samples > 1:
        problem = replace(problem, ids_rows=zeros, ids_cols=zeros)
    plan = plan_blocks(num_samples, ((True,),), 16)
    maxima, sums = run_stats(problem, plan)
    assert maxima.isfinite().all() and (sums == 0).all()
    f, inner = run_weights(problem, plan, torch.full_like(sums, torch.inf), torch.ones_like(sums))
    assert (f == 0).all() and (inner == 0).all()


@runs
@pytest.mark.parametrize("scale", [20, 100])
def test_not_a_number_reaches_every_row_that_meets_it(scale):
    problem = make_problem(Case(40, 16, scale, block_rows=16), torch.float32)
    problem.z_rows[0, 7, 3] = torch.nan
    plan = plan_blocks(40, ((True,),), 16)
    maxima, sums = run_stats(problem, plan)
    lse = sums.log() + maxima
    meets = torch.arange(40) != 7
    # Its image and its sum reach all others; its text, which is whole, meets every other sample's.
    assert lse[:, meets].isnan().all()
    assert lse[0, 7].isnan() and lse[2, 7].isnan() and lse[1, 7].isfinite()
    f, _ = run_weights(problem, plan, torch.zeros_like(lse), torch.ones_like(lse))
    assert f[0, :, 7, meets].isnan().all()


@runs
@pytest.mark.parametrize("name", ["many blocks", "ids"])
def test_two_runs_give_the_same_bits(name):
    assert_same_bits(run_both(CASES[name]), run_both(CASES[name]))


def run_both(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    problem = make_problem(case, dtype)
    plan = plan_blocks(case.num_samples, ((True,),), case.block_rows)
    maxima, sums = run_stats(problem, plan)
    lse = torch.where(sums > 0, sums.log() + maxima, torch.inf)
    return maxima, sums, *run_weights(problem, plan, lse, torch.ones_like(lse))


def assert_same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_no_access_out_of_bounds_and_no_race(name):
    plain = run_both(CASES[name])
    for reverse in (False, True):
        with checked_memory(reverse) as memory:
            checked = run_both(CASES[name])
        assert len(set(memory.launches)) == 4
        assert_same_bits(plain, checked)


# --- Losses, against the reference backend in float64 --------------------------------------------


def loss_and_gradients(
    embeddings: list[Tensor], weights: tuple[float, float], scale: float, name: str, options: dict
) -> list[Tensor]:
    dtype = torch.float64 if name == "reference" else torch.float32
    kind = {"dtype": dtype, "device": DEVICE, "requires_grad": True}
    leaves = [e.detach().to(DEVICE, dtype).requires_grad_() for e in embeddings]
    mixing = [torch.tensor(weight, **kind) for weight in weights]
    logit_scale = torch.tensor(scale, **kind)
    loss = gcl_kernels.gcl_loss(
        *leaves, logit_scale=logit_scale, fusion_weights=mixing, backend=name, **options
    )
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in (*leaves, *mixing, logit_scale))]


LOSSES: dict[str, tuple[int, int, float, tuple[float, float], dict]] = {
    # name: N, D, scale, fusion weights, options
    "default": (90, 40, 20.0, (1.0, 1.0), {}),
    "difference": (90, 33, 100.0, (0.7, -1.3), {}),
    "ids": (66, 20, 50.0, (1.0, 0.5), {"sample_ids": torch.arange(66) // 3}),
    "candidates": (
        50, 24, 60.0, (1.0, 1.0), {"candidates": [[0, 1, 1], [1, 0, 1], [1, 1, 0]]},
    ),
    "one sample": (1, 8, 20.0, (1.0, 1.0), {}),
}  # fmt: skip


@runs
@pytest.mark.parametrize("block_rows", [32, 4096])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, block_rows, monkeypatch):
    monkeypatch.setattr(backend, "FUSED_BLOCK_ROWS", block_rows)
    n, d, scale, weights, options = LOSSES[name]
    options = {key: v.to(DEVICE) if isinstance(v, Tensor) else v for key, v in options.items()}
    generator = torch.Generator().manual_seed(3)
    embeddings = [torch.randn(n, d, generator=generator) for _ in range(2)]
    exact, single, got = (
        loss_and_gradients(embeddings, weights, scale, backend_name, options)
        for backend_name in ("reference", "tiled", "triton")
    )
    for index, (g, s, e) in enumerate(zip(got, single, exact, strict=True)):
        assert error(g, e) <= 2 * error(s, e) + 8 * scale * UNIT, index
