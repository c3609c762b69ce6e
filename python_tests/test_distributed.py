"""Many processes: their losses and gradients are those of the whole batch in one process."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import MIXED, cut_small, emulate_half_products, run_backward, run_forward, spec_of
from contract import random_views
from oracle import dense_gcl, dense_loss, dense_neg_lse
from processes import Pool, join_gloo
from tolerance import assert_accurate
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as activation_checkpoint

import gcl_kernels
from gcl_kernels import distributed, passes, problem
from gcl_kernels.backends import base, tiled
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.distributed import meetings

WORLD = 5
EVERYONE = tuple(range(WORLD))
SIZES = [5, 9, 3, 1, 6]
BACKENDS_HERE = [name for name in ("tiled", "cpu") if BACKENDS[name].why_unavailable() is None]
EXCHANGES = ["gather", "ring"]
UPSTREAM = [1.0, -2.0, 0.5, 3.0, 1.5]
"""Every process multiplies its loss by one of these before it goes backward."""
FUSION_WEIGHTS = (1.3, 0.7)
OF_THE_SUM = ("fused", "formed")
SHARED = ("scale", "fusion_weights")
"""Gradients of which every process has a share."""

SUBGROUPS: dict[tuple[int, ...], Any] = {}


def group_of(members: tuple[int, ...]) -> Any:
    """A group of these processes; all processes ask for it."""
    if members == EVERYONE:
        return dist.group.WORLD
    if members not in SUBGROUPS:
        SUBGROUPS[members] = dist.new_group(list(members))
    return SUBGROUPS[members]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    store = tmp_path_factory.mktemp("processes") / "store"
    pool = Pool(WORLD, partial(join_gloo, store, WORLD))
    yield pool
    pool.close()


OF_SAMPLES = ("sample_ids", "present", "candidate_weights")
"""Options with an entry for each sample, along the last dimension."""


def shard(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
    return tensor.split(sizes, dim)[dist.get_rank()]


def step(
    road: str,
    sizes: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    options: dict[str, Any],
    members: tuple[int, ...] = EVERYONE,
    small_blocks: bool = False,
) -> dict[str, Tensor] | None:
    """This process's loss and gradients of a batch that is the same for all."""
    group = group_of(members)
    if dist.get_rank() not in members:
        return None
    options = dict(options)
    for name in options.keys() & OF_SAMPLES:
        of_samples = options[name]
        if name == "present" and road != "views":
            of_samples = of_samples[:2]
        options[name] = shard(of_samples, sizes, -1)
    views = [shard(v, sizes).to(dtype).requires_grad_() for v in random_views(sum(sizes), 19)]
    accum = torch.promote_types(dtype, torch.float32)
    s = torch.tensor(scale, dtype=accum, requires_grad=True)
    weights = [torch.tensor(w, dtype=accum, requires_grad=True) for w in FUSION_WEIGHTS]
    with pytest.MonkeyPatch.context() as patch:
        if road == "formed":
            patch.setattr(BACKENDS[options["backend"]], "fuses_scores", False)
        if small_blocks:
            cut_small(patch)

        def of_the_sum() -> Tensor:
            return gcl_kernels.gcl_loss(
                *views[:2], None, s, fusion_weights=weights, group=group, **options
            )

        loss = {
            "views": lambda: gcl_kernels.gcl_loss(*views, s, group=group, **options),
            "fused": of_the_sum,
            "formed": of_the_sum,
            "two views": lambda: gcl_kernels.clip_loss(*views[:2], s, group=group, **options),
        }[road]()
        (loss * UPSTREAM[dist.get_rank()]).sum().backward()
    return gradients(road, loss.detach(), s, views, weights)


def gradients(
    road: str, loss: Tensor, scale: Tensor, views: Sequence[Tensor], weights: Sequence[Tensor]
) -> dict[str, Tensor]:
    used = views if road == "views" else views[:2]
    found = {
        "loss": loss,
        "scale": scale.grad,
        **{f"views[{v}]": e.grad for v, e in enumerate(used)},
    }
    if road in OF_THE_SUM:
        found["fusion_weights"] = torch.stack([weight.grad for weight in weights])
    return found


def exact_step(
    road: str,
    sizes: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    options: dict[str, Any],
    members: tuple[int, ...],
    compute: torch.dtype,
) -> dict[str, Tensor]:
    """The same for the whole batch in one process, by the definition, in ``compute``."""
    parts = [v.to(dtype).split(sizes) for v in random_views(sum(sizes), 19)]
    views = [torch.cat([part[r] for r in members]).to(compute).requires_grad_() for part in parts]
    options = {
        name: value for name, value in options.items() if name not in ("backend", "exchange")
    }
    for name in options.keys() & OF_SAMPLES:
        parts = options[name].split(sizes, -1)
        options[name] = torch.cat([parts[r] for r in members], -1)
    if "present" in options and road != "views":
        options["present"] = options["present"][:2]
    reduction = options.pop("reduction", "mean")
    s = torch.tensor(scale, dtype=compute, requires_grad=True)
    weights = [torch.tensor(w, dtype=compute, requires_grad=True) for w in FUSION_WEIGHTS]
    options["reduction"] = "none"
    if road == "two views":
        losses = dense_loss(views[:2], s, candidates=[[False, True], [True, False]], **options)
    else:
        losses = dense_gcl(views if road == "views" else views[:2], s, weights, **options)
    divisor = len(losses) / len(members) if reduction == "mean" else 1
    shares = (losses / divisor).split([sizes[r] for r in members])
    sum((share.sum() * UPSTREAM[r] for share, r in zip(shares, members, strict=True))).backward()
    reduced = shares if reduction == "none" else [share.sum() for share in shares]
    loss = torch.cat([part.detach().reshape(-1) for part in reduced])
    return gradients(road, loss, s, views, weights)


def check(
    pool: Pool,
    road: str,
    sizes: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    options: dict[str, Any],
    members: tuple[int, ...] = EVERYONE,
    small_blocks: bool = False,
) -> None:
    results = pool.run(step, road, sizes, scale, dtype, options, members, small_blocks)
    got = [results[r] for r in members]
    result = {
        name: torch.stack([part[name] for part in got]).sum(0)
        if name in SHARED
        else torch.cat([part[name].reshape(-1, *part[name].shape[1:]) for part in got])
        for name in got[0]
    }
    accum = torch.promote_types(dtype, torch.float32)
    exact, dense = (
        exact_step(road, sizes, scale, dtype, options, members, compute)
        for compute in (torch.float64, accum)
    )
    n = sum(sizes[r] for r in members)
    of_all = n if options.get("reduction", "mean") != "mean" else len(members)
    lengths = [v.norm(dim=-1) for v in random_views(sum(sizes), 19)]
    for name, value in result.items():
        terms = {
            "loss": (scale + 10) * of_all,
            "scale": 8.0 * of_all,
            "fusion_weights": 8 * scale * of_all,
        }.get(name)
        if terms is None:
            length = lengths[int(name[-2])]
            terms = (8 * scale * of_all / n / length).norm().item()
        assert_accurate(name, value, exact[name], dense[name], terms)


IDS = torch.arange(sum(SIZES)) // 2 % 7
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "ids of all processes": {"sample_ids": IDS},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "other_positives": "exclude"},
    "one anchor": {"pair_weights": [[0, 1, 1], [0, 0, 0], [0, 0, 0]]},
    "candidates": {"candidates": [[0, 1, 1], [1, 0, 1], [1, 1, 0]], "self_similarity": "keep"},
    "one-sided candidates": {
        "candidates": [[1, 1, 0], [0, 1, 1], [1, 1, 1]],
        "other_positives": "exclude",
    },
    "weights": {"candidate_weights": torch.arange(3 * sum(SIZES)).view(3, -1) % 5 / 2},
    "present": {"present": torch.arange(3 * sum(SIZES)).view(3, -1) % 5 > 0},
    "present, none": {
        "present": torch.arange(3 * sum(SIZES)).view(3, -1) % 4 > 0,
        "reduction": "none",
        "sample_ids": IDS,
    },
    "extra": {"extra_negatives": random_views(7, 19)[0], "false_negative_margin": 0.1},
}
OF_TWO_VIEWS = {name: OPTIONS[name] for name in ("default", "ids of all processes", "sum")}
ROADS = {
    "views": OPTIONS,
    "fused": OPTIONS,
    "formed": {name: OPTIONS[name] for name in ("default", "none")},
    "two views": OF_TWO_VIEWS,
}
"""``formed``: score fusion of a backend without block functions for it."""


def test_every_pair_of_samples_meets_once():
    for world in range(1, 9):
        sizes = [(5 * rank + 3) % 7 + 1 for rank in range(world)]
        firsts = [sum(sizes[:rank]) for rank in range(world)]
        met = torch.zeros(sum(sizes), sum(sizes), dtype=torch.int)
        for rank in range(world):
            found = meetings(rank, sizes)
            assert len(found) == world // 2
            for meeting in found:
                (other,) = meeting.ranks
                assert (meeting.rows.total, meeting.cols.total) == (sizes[rank], sizes[other])
                rows, cols = (
                    slice(firsts[of] + side.start, firsts[of] + side.stop)
                    for of, side in ((rank, meeting.rows), (other, meeting.cols))
                )
                met[rows, cols] += 1
                met[cols, rows] += 1
        of = torch.repeat_interleave(torch.arange(world), torch.tensor(sizes))
        assert torch.equal(met, (of[:, None] != of[None, :]).int())


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("road", ROADS)
def test_equals_one_process(pool, road, backend, exchange):
    """Shards of different sizes, in blocks that hold them and in blocks that do not."""
    how = {"backend": backend, "exchange": exchange}
    for options in ROADS[road].values():
        for scale, small_blocks in ((20.0, False), (100.0, True), (60.0, False)):
            given = {**options, **how}
            check(pool, road, SIZES, scale, torch.float32, given, small_blocks=small_blocks)
    check(pool, road, [40, 23, 31, 17, 28], 30.0, torch.float64, how)
    check(pool, road, [1] * WORLD, 30.0, torch.float32, how)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("members", [(1, 2), (0, 3), (0, 2, 4), (0, 1, 3, 4), (1,)], ids=str)
def test_subgroup(pool, members, backend, exchange):
    """Ranks of a group are not those of all processes; opposite processes halve their rectangle."""
    how = {"backend": backend, "exchange": exchange}
    for road in ROADS:
        for scale, small_blocks in ((20.0, False), (100.0, True)):
            check(pool, road, SIZES, scale, torch.float32, how, members, small_blocks)
        given = {**how, "sample_ids": IDS}
        check(pool, road, SIZES, 30.0, torch.float64, given, members)


def rows_without_negatives() -> list[Tensor]:
    """All ids are equal in all processes: no negatives anywhere; then only this one's are."""
    results = []
    for ids in (torch.zeros(4, dtype=torch.int32), torch.full((4,), dist.get_rank())):
        views = [v.float().requires_grad_() for v in random_views(4, 8, seed=dist.get_rank())]
        for e_it in (None, views[2]):
            loss = gcl_kernels.gcl_loss(
                *views[:2], e_it, sample_ids=ids, group="world", exchange="ring"
            )
            loss.backward()
            results += [loss.detach(), *(v.grad for v in views[: 2 if e_it is None else 3])]
    lse = gcl_kernels.neg_lse(
        views, 5.0, sample_ids=torch.zeros(4, dtype=torch.int64), group="world"
    )
    return [*results, lse.detach()]


def test_rows_without_negatives(pool):
    for results in pool.run(rows_without_negatives):
        assert all(result.isfinite().all() for result in results[:-1])
        assert (results[-1] == -torch.inf).all()


def own_rows(sizes: Sequence[int], ids: Tensor | None) -> Tensor:
    views = [shard(v, sizes) for v in random_views(sum(sizes), 19)]
    mine = None if ids is None else shard(ids, sizes)
    table = [[True, True, False], [False, True, True], [False] * 3]
    return gcl_kernels.neg_lse(views, 7.0, candidates=table, sample_ids=mine, group="world")


@pytest.mark.parametrize("ids", [None, IDS], ids=["default", "given"])
def test_neg_lse_of_own_rows(pool, ids):
    result = torch.cat(pool.run(own_rows, SIZES, ids), 1)
    table = [[True, True, False], [False, True, True]]
    expected = dense_neg_lse(random_views(sum(SIZES), 19), torch.tensor(7.0), table, ids)
    torch.testing.assert_close(result[:2], expected)
    assert (result[2] == -torch.inf).all()


def subset_step(needs: Sequence[bool], road: str, dtype: torch.dtype) -> list[Tensor | None]:
    """Gradients where only some inputs need one."""
    torch.manual_seed(dist.get_rank())
    *needs_view, needs_scale = needs
    views = [torch.randn(11, 6, dtype=dtype).requires_grad_(need) for need in needs_view]
    scale = torch.tensor(20.0, dtype=dtype, requires_grad=needs_scale)
    e_it = views[2] if road == "views" else None
    loss = gcl_kernels.gcl_loss(*views[:2], e_it, scale, group="world")
    loss.backward()
    return [leaf.grad for leaf in (*views, scale)]


@pytest.mark.parametrize("road", ["views", "fused"])
def test_subset_of_inputs(pool, road):
    """Each gradient is the one that it is where all inputs need one."""
    full = pool.run(subset_step, (True,) * 4, road, torch.float64)
    for needs in itertools.product([False, True], repeat=4):
        if not any(needs) or (road == "fused" and (needs[2] or not any((*needs[:2], needs[3])))):
            continue
        grads = pool.run(subset_step, needs, road, torch.float64)
        for rank in range(WORLD):
            for need, grad, expected in zip(needs[:3], grads[rank], full[rank], strict=False):
                assert (grad is None) == (not need)
                if need:
                    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
        if needs[3]:
            # The processes' shares of the scale's gradient are of pairs that each multiplies.
            whole, expected = (sum(of_rank[3] for of_rank in run) for run in (grads, full))
            torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-14)


def different_inputs(road: str) -> list[Tensor]:
    """Gradients of all inputs, and of the first alone in the first process."""
    views = [v.requires_grad_() for v in random_views(11, 6, seed=dist.get_rank())]
    inputs = views[: 2 if road == "fused" else 3]
    loss = gcl_kernels.gcl_loss(*views[:2], None if road == "fused" else views[2], group="world")
    every = torch.autograd.grad(loss, inputs, retain_graph=True)
    asked = inputs[:1] if dist.get_rank() == 0 else inputs
    return [
        (got - want).abs().max()
        for got, want in zip(torch.autograd.grad(loss, asked), every, strict=False)
    ]


@pytest.mark.parametrize("road", ["views", "fused"])
def test_processes_may_ask_for_gradients_of_different_inputs(pool, road):
    for differences in pool.run(different_inputs, road):
        assert max(differences) < 1e-12


def repeated(exchange: str) -> bool:
    """Whether two runs, and two backward passes of one, give the same bits."""
    views = [v.float().requires_grad_() for v in random_views(50, 24, seed=dist.get_rank())]
    s = torch.tensor(20.0, requires_grad=True)
    inputs, runs = (*views, s), []
    for _ in range(2):
        loss = gcl_kernels.gcl_loss(*inputs, group="world", exchange=exchange)
        for retain in (True, False):
            runs.append((loss.detach(), *torch.autograd.grad(loss, inputs, retain_graph=retain)))
    return all(all(map(torch.equal, runs[0], run)) for run in runs[1:])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_same_bits(pool, exchange):
    assert all(pool.run(repeated, exchange))


def swapped(road: str, backend: str, exchange: str) -> list[Tensor]:
    """Two losses of the same shapes; rank 1 goes backward in another order. Then all in one."""
    options = {"group": "world", "exchange": exchange, "backend": backend}
    batches = [
        [v.float().requires_grad_() for v in random_views(11, 6, seed=10 * b + dist.get_rank())]
        for b in range(2)
    ]
    scale = torch.tensor(20.0, requires_grad=True)
    grads = []
    for order in ((1, 0) if dist.get_rank() == 1 else (0, 1), (0, 1)):
        losses = []
        for i, t, it in batches:
            e_it = None if road == "fused" else it
            losses.append(gcl_kernels.gcl_loss(i, t, e_it, scale, **options))
        for b in order:
            inputs = (*batches[b][: 2 if road == "fused" else 3], scale)
            grads += torch.autograd.grad(losses[b], inputs)
    return grads


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("road", ["views", "fused"])
def test_backward_passes_in_different_orders_make_nan(pool, road, backend, exchange):
    """No wrong gradient; and the next step has gradients again."""
    for grads in pool.run(swapped, road, backend, exchange):
        mixed, right = grads[: len(grads) // 2], grads[len(grads) // 2 :]
        assert all(grad.isnan().all() for grad in mixed)
        assert all(grad.isfinite().all() for grad in right)


def half_step(dtype: torch.dtype, road: str, upstream: float) -> list[tuple[Tensor, ...]]:
    """Products of half types, as on a GPU; and beside it the whole batch in one process."""
    with pytest.MonkeyPatch.context() as patch:
        emulate_half_products(patch)
        whole = [v[:30].to(dtype) for v in random_views(60, 32)]
        parts = [v.split([14, 6, 2, 5, 3])[dist.get_rank()] for v in whole]
        found = []
        for views, group in ((parts, dist.group.WORLD), (whole, None)):
            leaves = [v.float().requires_grad_(k != 1) for k, v in enumerate(views)]
            scale = torch.tensor(20.0, requires_grad=True)
            loss = gcl_kernels.gcl_loss(
                *leaves[:2], None if road == "fused" else leaves[2], scale, reduction="sum",
                compute_dtype=dtype, backend="tiled", group=group,
            )  # fmt: skip
            (loss * upstream).backward()
            used = leaves[:1] if road == "fused" else leaves[::2]
            found.append((loss.detach(), scale.grad, *(v.grad for v in used)))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("road", ["views", "fused"])
@pytest.mark.parametrize("upstream", [1.0, -1e-7])
def test_half_products(pool, dtype, road, upstream):
    """As in one process, also where weights are below the smallest float16, and with a frozen
    view."""
    results = pool.run(half_step, dtype, road, upstream)
    for k, expected in enumerate(results[0][1]):
        got = [parts[k] for parts, _ in results]
        whole = torch.cat(got) if expected.dim() else torch.stack(got).sum()
        assert (whole - expected).norm() <= torch.finfo(dtype).eps / 2 * expected.norm()


class _Memory(TorchDispatchMode):
    """Elements of the largest tensor made, and of all alive at once, beside those given."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in given}
        self.largest = self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def _elements(self) -> int:
        return sum(elements for _, elements in self._alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata in self._given:
                    continue
                elements = tensor.untyped_storage().nbytes() // 4
                self._alive[reference.cdata] = reference, elements
                self.largest = max(self.largest, elements)
        if self._elements() > self.peak:  # of them, some may be gone
            self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
            self.peak = max(self.peak, self._elements())
        return result


class _Rank:
    """A group's face, of a process without any others."""

    def __init__(self, world: int, rank: int = 0) -> None:
        self.size, self.rank = (lambda: world), (lambda: rank)


class _Arrived:
    def wait(self) -> None:
        pass


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("road", ["views", "fused"])
def test_memory(monkeypatch, road, exchange):
    """Nothing grows with the square of the batch, and embeddings take what the docs say: seen on
    one of nine processes whose others send anything."""
    world, n, d = 5, 160, 64
    monkeypatch.setattr(distributed, "_group", lambda name: _Rank(world))
    monkeypatch.setattr(distributed, "_all_gather", lambda *a, **k: _Arrived())
    monkeypatch.setattr(dist, "P2POp", lambda *a, **k: a)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda calls: [_Arrived()])
    fuses = road == "fused"
    monkeypatch.setattr(passes, "agree", lambda *a, **k: torch.tensor([n] * world + [0]))
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", 0)
    monkeypatch.setattr(base, "_CHUNK_ELEMENTS", {"default": 1024})
    monkeypatch.setattr(tiled, "BLOCK_ROWS", {"default": 32})
    monkeypatch.setattr(tiled, "FUSED_BLOCK_ROWS", {"default": 16})

    views = [v.float() for v in random_views(n, d)][: 2 if fuses else 3]
    scale, needs = torch.tensor(20.0), [True] * (len(views) + 2)
    place = {"group": "group", "exchange": exchange}
    spec = spec_of(mixed=MIXED if fuses else None, **place)
    with _Memory(views) as forward:
        results = run_forward(views, spec, needs, scale)
    with _Memory([*views, *results]) as backward:
        run_backward(views, spec, needs, scale, results)
    shard = len(views) * n * d
    whole = world * shard
    # z, or H z, besides.
    limits = {"gather": (shard + 1.5 * whole, shard + 3 * whole), "ring": (3 * shard, 6 * shard)}
    for watch, limit in zip((forward, backward), limits[exchange], strict=True):
        assert watch.largest <= whole
        assert watch.peak <= limit + 0.9 * shard  # tiles, lines, coefficients


# --- In training ---------------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image, self.text = (
            nn.Parameter(torch.randn(6, 5, generator=generator).double()) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images @ self.image, texts @ self.text, self.log_scale.exp()


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, 24, 6, generator=generator).double()
    return images, texts


def train(exchange: str, road: str) -> list[Tensor]:
    """Three steps of DistributedDataParallel, with shards of different sizes."""
    model = nn.parallel.DistributedDataParallel(Towers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for seed in range(3):
        optimizer.zero_grad()
        i, t, s = model(*(shard(x, [7, 4, 6, 2, 5]) for x in pairs(seed)))
        e_it = i + t if road == "views" else None
        gcl_kernels.gcl_loss(i, t, e_it, s, group="world", exchange=exchange).backward()
        optimizer.step()
    return [p.detach() for p in model.module.parameters()]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("road", ["views", "fused"])
def test_data_parallel_training_is_training_on_the_whole_batch(pool, road, exchange):
    model = Towers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for seed in range(3):
        optimizer.zero_grad()
        i, t, s = model(*pairs(seed))
        dense_gcl([i, t], s).backward()
        optimizer.step()
    for parameters in pool.run(train, exchange, road):
        for result, expected in zip(parameters, model.parameters(), strict=True):
            torch.testing.assert_close(result, expected.detach(), rtol=1e-12, atol=1e-13)


class TowersAndLoss(nn.Module):
    """Its forward is the whole forward pass, as fully_shard and checkpointing want it."""

    def __init__(self, group: str | None, exchange: str = "gather", **options: Any) -> None:
        super().__init__()
        self.image, self.text = (nn.Linear(6, 5, bias=False) for _ in range(2))
        for tower in (self.image, self.text):
            nn.init.normal_(tower.weight, generator=torch.Generator().manual_seed(3))
        self.loss = gcl_kernels.GCLLoss(
            learnable_scale=True, temperature=0.1, group=group, exchange=exchange, **options
        )
        self.double()

    def forward(self, images: Tensor, texts: Tensor, road: str = "fused") -> Tensor:
        i, t = self.image(images), self.text(texts)
        return self.loss(i, t, i + t if road == "views" else None)


LOG_BOUND = torch.tensor(12.0).double().log().item()
"""Of the scale in the runs below, which begin at 10."""


def run_of_steps(
    model: nn.Module, sizes: Sequence[int] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of five steps, and log scales after them: up, to far beyond the bound, and down."""
    scale = [p for name, p in model.named_parameters() if "log_logit_scale" in name]
    towers = [p for name, p in model.named_parameters() if "log_logit_scale" not in name]
    optimizer = torch.optim.SGD([{"params": towers, "lr": 0.1}, {"params": scale, "lr": 0.5}])
    losses, scales = [], []
    for step_number in range(5):
        if step_number == 3:
            for group in optimizer.param_groups:
                group["maximize"] = True
        images, noise = pairs(step_number)
        batch = [images, images + 0.1 * noise]
        if sizes is not None:
            batch = [shard(x, sizes) for x in batch]
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        (parameter,) = scale
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        scales.append(whole.detach().clone())
    return losses, scales


def sharded(wrap: str, exchange: str, folder: str) -> tuple[list[Tensor], list[Tensor], Any]:
    """A run, the state dict after it, and whether a checkpoint of it is the same model."""
    sizes = [7, 4, 6, 2, 5]
    model = TowersAndLoss("world", exchange, max_logit_scale=12.0)
    wrapped = parallel(wrap, model)
    losses, scales = run_of_steps(wrapped, sizes)
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    resumed = TowersAndLoss("world", exchange, max_logit_scale=12.0)
    parallel(wrap, resumed)
    given = {"model": get_model_state_dict(resumed)}
    checkpoint.load(given, checkpoint_id=folder)
    set_model_state_dict(resumed, given["model"])
    same = get_model_state_dict(resumed, options=options)
    assert all(torch.equal(same[name], value) for name, value in state.items())
    if wrap == "fully_shard":
        with pytest.raises(RuntimeError, match="log_logit_scale: .* DTensor; call the loss in the"):
            model.loss(*random_views(4, 5)[:2])
    return losses, scales, state


def parallel(wrap: str, model: TowersAndLoss) -> nn.Module:
    if wrap == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    if wrap == "fully_shard twice":
        fully_shard(model.loss, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard", "fully_shard twice"])
def test_a_learnable_scale_is_one_in_all_processes(pool, tmp_path, wrap, exchange):
    """Also at its bound, which a copy of a sharded scale would forget."""
    model = TowersAndLoss(None, max_logit_scale=12.0)
    expected, expected_scales = run_of_steps(model)
    log_scales = torch.cat(expected_scales)
    assert log_scales[2] > LOG_BOUND + 0.1 and log_scales[-1] < LOG_BOUND  # what is tested
    runs = pool.run(sharded, wrap, exchange, str(tmp_path))
    mean = torch.stack([torch.stack(losses) for losses, _, _ in runs]).mean(0)
    torch.testing.assert_close(mean, torch.stack(expected))
    for _, scales, state in runs:
        assert all(torch.equal(s, of_first) for s, of_first in zip(scales, runs[0][1], strict=True))
        torch.testing.assert_close(torch.cat(scales), log_scales)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value)
        model.load_state_dict(state)


def documented() -> tuple[float, Tensor]:
    page = (Path(__file__).parent.parent / "docs/distributed.md").read_text()
    _, sharding = re.findall(r"```python\n(.*?)```", page, re.S)
    found = {"torch": torch, "gcl_kernels": gcl_kernels}
    torch.manual_seed(0)
    exec(sharding, found)
    model = found["model"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images = torch.randn(16, 64)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(images, images + 0.5 * torch.randn(16, 64))
        loss.backward()
        optimizer.step()
    return loss.item(), model.loss_fn.log_logit_scale.full_tensor().detach()


def test_the_documented_sharded_module(pool):
    runs = pool.run(documented)
    for loss, scale in runs:
        assert 0 < loss < 5
        assert scale.shape == (1,) and torch.equal(scale, runs[0][1])


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_of_a_0d_scale_load(assign):
    model = TowersAndLoss(None)
    state = {**model.state_dict(), "loss.log_logit_scale": torch.tensor(1.5).double()}
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model.loss.log_logit_scale, torch.tensor([1.5]).double())
    assert state["loss.log_logit_scale"].dim() == 0
    with pytest.raises(RuntimeError, match="Unexpected key"):
        gcl_kernels.GCLLoss().load_state_dict({"log_logit_scale": torch.tensor(1.5)})
    with pytest.raises(RuntimeError, match="size mismatch for log_logit_scale"):
        gcl_kernels.GCLLoss(learnable_scale=True).load_state_dict(
            {"log_logit_scale": torch.ones(2)}
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_of_half_type_is_rounded_once(dtype):
    views = [v.to(dtype) for v in random_views(6, 8)]
    module = gcl_kernels.GCLLoss(learnable_scale=True).to(dtype)
    scale = module.log_logit_scale.detach().float().exp()
    assert torch.equal(module(*views), gcl_kernels.gcl_loss(*views, scale))


def test_a_scale_that_is_averaged_copied_and_stepped_at_once():
    views = [v.float() for v in random_views(6, 8)]
    ends = []
    for how in ({}, {"foreach": True}, {"fused": True}):
        module = gcl_kernels.GCLLoss(learnable_scale=True, max_logit_scale=15.0)
        average = torch.optim.swa_utils.AveragedModel(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, maximize=True, **how)
        for _ in range(3):
            optimizer.zero_grad()
            module(*views).backward()
            optimizer.step()
            average.update_parameters(module)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        assert torch.equal(copied(*views), module(*views))
        assert module.log_logit_scale.exp().item() == pytest.approx(15)
        ends.append(torch.cat([module.log_logit_scale, average.module.log_logit_scale]).detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


class Regions(nn.Module):
    """Each of the losses is a checkpointed region with the model in it."""

    def __init__(self, reentrant: bool | None, road: str, exchange: str, losses: int) -> None:
        super().__init__()
        self.inside = TowersAndLoss("world", exchange)
        self.reentrant, self.road, self.losses = reentrant, road, losses

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        total = 0
        for k in range(self.losses):
            given = (images * (k + 1), texts, self.road)
            if self.reentrant is None:
                loss = self.inside(*given)
            else:
                loss = activation_checkpoint(self.inside, *given, use_reentrant=self.reentrant)
            total = total + (k + 1) * loss
        return total


def checkpointed_steps(
    reentrant: bool | None, road: str, exchange: str, losses: int
) -> list[Tensor]:
    model = nn.parallel.DistributedDataParallel(Regions(reentrant, road, exchange, losses))
    found = []
    for seed in range(2):
        images, texts = (shard(x, [7, 4, 6, 2, 5]).requires_grad_() for x in pairs(seed))
        model.zero_grad()
        loss = model(images, texts)
        loss.backward()
        found += [loss.detach(), images.grad, *(p.grad.clone() for p in model.parameters())]
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("road", ["views", "fused"])
def test_recomputed_in_the_backward_pass(pool, road, exchange):
    """A checkpointed region's collectives run again in the backward pass, in all processes."""
    for reentrant, losses in ((False, 1), (True, 1), (False, 2)):
        expected = pool.run(checkpointed_steps, None, road, exchange, losses)
        results = pool.run(checkpointed_steps, reentrant, road, exchange, losses)
        for result, of_rank in zip(results, expected, strict=True):
            for tensor, same in zip(result, of_rank, strict=True):
                assert torch.equal(tensor, same)


def beside_open_clip(local_loss: bool) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradients here and in open_clip, averaged by DistributedDataParallel."""
    import open_clip

    from gcl_kernels.integrations import open_clip as integration

    def unit(x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)

    given = (local_loss, True, False, dist.get_rank(), WORLD)
    theirs = open_clip.ClipLoss(*given)
    two_of_three = [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    adapter = integration.GCLLoss(*given, pair_weights=two_of_three, candidates=two_of_three)
    world = dist.group.WORLD
    losses = {
        "open_clip": lambda i, t, s: theirs(unit(i), unit(t), s),
        "clip_loss": lambda i, t, s: gcl_kernels.clip_loss(i, t, s, group=world),
        "adapter": lambda i, t, s: adapter(unit(i), unit(t), s),
    }
    results = []
    for loss in losses.values():
        model = nn.parallel.DistributedDataParallel(Towers())
        value = loss(*model(*(x.split(4)[dist.get_rank()] for x in pairs(0))))
        value.backward()
        mean = value.detach().clone()
        dist.all_reduce(mean)
        results.append([mean / WORLD, *(p.grad for p in model.parameters())])
    return [pair for ours in results[1:] for pair in zip(ours, results[0], strict=True)]


@pytest.mark.parametrize("local_loss", [True, False])
def test_gradients_are_those_of_open_clip(pool, local_loss):
    pytest.importorskip("open_clip")
    for compared in pool.run(beside_open_clip, local_loss):
        for ours, theirs in compared:
            torch.testing.assert_close(ours, theirs)


def compiled_step(fuses: bool) -> tuple[list[Tensor], list[Tensor]]:
    pair = group_of((0, 1))
    if dist.get_rank() > 1:
        return [], []
    views = [v.float().requires_grad_() for v in random_views(12, 8, seed=dist.get_rank())]
    scale = torch.tensor(20.0, requires_grad=True)

    def loss(i: Tensor, t: Tensor, it: Tensor, s: Tensor) -> Tensor:
        e_it = None if fuses else it
        return gcl_kernels.gcl_loss(i, t, e_it, s, group=pair, exchange="ring")

    inputs = (*views[: 2 if fuses else 3], scale)
    runs = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(*views, scale)
        runs.append([value.detach(), *torch.autograd.grad(value, inputs)])
    return runs[0], runs[1]


@pytest.mark.parametrize("fuses", [False, True])
def test_compiles(pool, fuses):
    for eager, compiled in pool.run(compiled_step, fuses):
        for expected, result in zip(eager, compiled, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def group_argument() -> tuple[str, int]:
    return distributed.resolve_group("world", "gather", "tiled"), dist.get_world_size()


def test_what_operators_are_given_depends_on_the_number_of_processes(pool):
    """For torch.compile's caches: jobs of two and of three processes have groups of one name."""
    for argument, processes in pool.run(group_argument):
        assert argument.startswith(f"{processes}:")


def without_grad() -> tuple[Tensor, Tensor]:
    views = random_views(6, 8, seed=dist.get_rank())
    with torch.no_grad():
        evaluated = gcl_kernels.gcl_loss(*views, group="world")
    return evaluated, gcl_kernels.gcl_loss(*views, group="world")


def test_no_grad(pool):
    for evaluated, trained in pool.run(without_grad):
        assert torch.equal(evaluated, trained)


# --- Errors --------------------------------------------------------------------------------------


def messages(case: str) -> list[str]:
    """What a call that differs in rank 1 raises, and then what one that does not raises."""
    odd = dist.get_rank() == 1
    changes: dict[str, dict[str, Any]] = {
        "dimension": {"dim": 5},
        "compute_dtype": {"compute_dtype": torch.float64},
        "candidates": {"candidates": [[False, True, True]] * 3},
        "normalize": {"normalize": False},
        "sample_ids": {"sample_ids": torch.arange(4)},
        "exchange": {"exchange": "ring"},
        "logit_scale": {"logit_scale": 21.0},
        "gradients": {"grad": False},
        "views": {"fused": True},
    }
    found = []
    for options in (changes[case] if odd else {}, {}):
        options = dict(options)
        views = [v.float() for v in random_views(4, options.pop("dim", 6))]
        views = [v.requires_grad_(options.get("grad", True)) for v in views]
        options.pop("grad", None)
        options.setdefault("logit_scale", 20.0)
        e_it = None if options.pop("fused", False) else views[2]
        try:
            loss = gcl_kernels.gcl_loss(*views[:2], e_it, group="world", **options)
            loss.backward()
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize(
    "case",
    [
        "dimension",
        "compute_dtype",
        "candidates",
        "normalize",
        "sample_ids",
        "exchange",
        "logit_scale",
        "gradients",
        "views",
    ],
)
def test_different_calls_fail_in_every_process_and_the_next_succeeds(pool, case):
    for rank, (error, after) in enumerate(pool.run(messages, case)):
        assert error.startswith(f"ValueError: group: expected the same {case} in all processes")
        assert f"rank {rank} has" in error
        assert f"ranks {[1] if rank != 1 else [0, 2, 3, 4]} have another" in error
        assert after == ""


def loss_or_error(scale: float) -> float | str:
    try:
        return gcl_kernels.gcl_loss(*random_views(4, 6), torch.tensor(scale), group="world").item()
    except ValueError as error:
        return str(error)


def at_scales(scale: float, step: float) -> float | str:
    """The loss where the scale grows by ``step`` from rank to rank."""
    return loss_or_error(scale * (1 + step * dist.get_rank()))


def with_a_bad_scale_in_rank_1() -> float | str:
    return loss_or_error(torch.nan if dist.get_rank() == 1 else 20.0)


def test_scales_of_different_last_bits(pool):
    assert all(loss > 0 for loss in pool.run(at_scales, 20.0, 1e-7))
    assert all(loss != loss for loss in pool.run(at_scales, torch.nan, 0.0))
    assert all("same logit_scale" in error for error in pool.run(with_a_bad_scale_in_rank_1))
    # Neighbours are close, the first and the last are not: all must come to one verdict.
    assert all("same logit_scale" in error for error in pool.run(at_scales, 20.0, 0.6e-5))


@pytest.mark.parametrize(
    ("backends", "expected"),
    [("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu"), ("cuda:nccl", "cuda")],
)
def test_the_host_waits_for_no_gpu_where_a_group_has_a_cpu_backend(monkeypatch, backends, expected):
    """And where it has none, one process says so once."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    distributed._warn_of_waiting.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rank in (1, 0, 0):
            assert distributed._host_device(_Rank(2, rank), torch.device("cuda")) == torch.device(
                expected
            )
    told = [str(warning.message) for warning in caught]
    assert len(told) == (expected == "cuda")
    assert all(text.startswith("group: 'cuda:nccl' has no backend for the CPU") for text in told)


def group_errors() -> list[str]:
    views = random_views(4, 6)
    subgroup = group_of((0, 2))
    found = []
    for options in (
        {"group": "everyone"},
        {"group": dist.group.WORLD, "backend": "reference"},
        {"group": subgroup} if dist.get_rank() == 1 else {"group": 7},
        {"group": dist.group.WORLD, "exchange": "broadcast"},
    ):
        try:
            gcl_kernels.gcl_loss(*views, **options)
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_group_without_processes():
    with pytest.raises(RuntimeError, match="'world' needs torch.distributed, which is not init"):
        gcl_kernels.gcl_loss(*random_views(4, 6), group="world")
    for wrong, message in (({"group": 3}, "group: expected"), ({"exchange": "rnig"}, "exchange:")):
        with pytest.raises((TypeError, ValueError), match=message):
            gcl_kernels.GCLLoss(**wrong)
    copied = copy.deepcopy(gcl_kernels.GCLLoss(group="world", exchange="ring"))
    assert pickle.loads(pickle.dumps(copied)).group == "world"


def test_group_errors(pool):
    for rank, found in enumerate(pool.run(group_errors)):
        wrong, dense, outside, exchange = found
        assert wrong == (
            "TypeError: group: expected 'world', a torch.distributed process group (of a "
            "DeviceMesh: mesh.get_group()) or None, got 'everyone'"
        )
        assert dense == (
            "RuntimeError: backend: 'reference' is for one process, got a group of several"
        )
        if rank == 1:
            assert outside == "ValueError: group: this process is not a member of it"
        assert exchange == "ValueError: exchange: expected one of 'gather', 'ring', got 'broadcast'"


# --- Benchmarks ----------------------------------------------------------------------------------


def benchmarked(task: str) -> list[list[Tensor]]:
    from benchmarks import processes

    leaves = [
        v.requires_grad_() for v in processes.random_shards(task, 40, 16, WORLD)[dist.get_rank()]
    ]
    scale = torch.tensor(20.0, requires_grad=True)
    found = []
    for loss in processes.losses(task).values():
        value = loss(*leaves, scale)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    return found


@pytest.mark.parametrize("task", ["gcl", "fused", "clip"])
def test_benchmarked_peers_agree(pool, task):
    if task == "clip":
        pytest.importorskip("open_clip")
    for ours, *others in pool.run(benchmarked, task):
        for other in others:
            torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-6)
