"""A step on a GPU neither waits for the host nor copies from it, so that CUDA graphs capture it.

There is no GPU here: the operations of a step are listed on fake CUDA tensors, which have a device
and a shape and no values. One that mixes devices, or reads a value, would synchronise.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calls import MIXED, add_product, run_backward, run_forward, spec_of
from contract import both_fused_roads, every_road
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gcl_kernels
from gcl_kernels import operators, terms
from gcl_kernels.backends import triton as triton_backend
from gcl_kernels.dispatch import BACKENDS

READS_OR_COPIES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
CUDA = torch.device("cuda:0")


class Operations(TorchDispatchMode):
    """Lists what would make the host wait, with the line of the package that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        self.count += 1
        if len(devices) > 1 or ("cuda" in devices and func.name() in READS_OR_COPIES):
            ours = [f for f in traceback.extract_stack() if "gcl_kernels/" in f.filename]
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in ours[-1:]]
            self.waits.append(f"{func.name()} at {where}")
        return result


@pytest.fixture
def operations(monkeypatch) -> Callable[[Callable[[], None]], None]:
    """Checks a function's operations on fake tensors."""
    # Calls the operators' bodies instead of the operators.
    monkeypatch.setattr(operators, "_call", lambda _, body, given, *static: body(*given, *static))
    # torch.addmm with out_dtype has no fake.
    monkeypatch.setattr(BACKENDS["tiled"], "add_product", add_product)

    def check(function: Callable[[], None]) -> None:
        with FakeTensorMode(), torch.no_grad(), Operations() as found:
            function()
        assert found.count > 10
        assert not found.waits

    return check


def embeddings(count: int, dtype: torch.dtype = torch.float32, n: int = 40) -> list[Tensor]:
    return [torch.empty(n, 24, dtype=dtype, device=CUDA) for _ in range(count)]


TABLE = [[True, False, True], [True, True, False], [False, True, True]]
OPTIONS = {
    "default": {},
    "exclude": {"other_positives": "exclude"},
    "keep": {"self_similarity": "keep"},
    "candidates": {"candidates": TABLE},
    "candidates, exclude": {"candidates": TABLE, "other_positives": "exclude"},
    "pair_weights": {"pair_weights": [[0, 1, 2], [0.5, 0, 0], [1, 3, 0]]},
    "none": {"reduction": "none"},
    "pairs": {"reduction": "pairs"},
    "margin": {"false_negative_margin": 0.1},
    "not normalised": {"normalize": False},
}


@pytest.mark.parametrize("scale", ["number", "tensor"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_road
def test_losses(operations, road, options, scale):
    def step() -> None:
        views = embeddings(3 if road == "views" else 2)
        s = 20.0 if scale == "number" else torch.empty((), device=CUDA)
        gcl_kernels.gcl_loss(*views, logit_scale=s, backend="tiled", **options)

    operations(step)


@pytest.mark.parametrize("same_id", ["ignore", "positive"])
@both_fused_roads
def test_candidates(operations, road, same_id):
    """What is given of each sample, and extra negatives."""

    def step() -> None:
        ids = torch.empty(40, dtype=torch.int64, device=CUDA)
        gcl_kernels.gcl_loss(
            *embeddings(2),
            backend="tiled",
            sample_ids=ids,
            same_id=same_id,
            present=torch.empty(2, 40, dtype=torch.bool, device=CUDA),
            candidate_weights=torch.empty(3, 40, device=CUDA),
            extra_negatives=embeddings(1, n=7)[0],
            extra_ids=ids[:7],
        )

    operations(step)


@pytest.mark.parametrize("loss", [gcl_kernels.clip_loss, gcl_kernels.nt_xent_loss])
def test_losses_of_two_views(operations, loss):
    operations(lambda: loss(*embeddings(2), 20.0, backend="tiled"))


@both_fused_roads
def test_learnable_fusion_weights(operations, road):
    def step() -> None:
        weights = [torch.empty((), device=CUDA) for _ in range(2)]
        gcl_kernels.gcl_loss(*embeddings(2), fusion_weights=weights, backend="tiled")

    operations(step)


@pytest.mark.parametrize("pool", ["local", "union"])
def test_ranks(operations, pool):
    def step() -> None:
        ids = torch.empty(40, dtype=torch.int64, device=CUDA)
        present = torch.empty(2, 40, dtype=torch.bool, device=CUDA)
        options = {"pool": pool, "fusion_weights": (1, 0.5), "present": present}
        gcl_kernels.hits(gcl_kernels.positive_ranks(embeddings(2), **options, sample_ids=ids))
        gcl_kernels.positive_ranks(embeddings(2), pool=pool)

    operations(step)


@pytest.fixture
def launches_of_triton(monkeypatch) -> None:
    """Triton's launchers, as on an H100; what they launch is left out."""
    pytest.importorskip("triton")
    from gcl_kernels.backends.triton import embeddings as of_samples
    from gcl_kernels.backends.triton import fused_weights, primitives, slots, stats, tiles, weights

    for module in (of_samples, fused_weights, slots, stats, weights):
        monkeypatch.setattr(module, "start", lambda *_: None)
    for module in (primitives, triton_backend):
        monkeypatch.setattr(module, "device_chip", lambda _: tiles.CHIPS["sm_90"])
    monkeypatch.setattr(BACKENDS["triton"], "why_not", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(BACKENDS["triton"], "add_product", add_product)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_operators(operations, request, backend, dtype, ids):
    """Forward and backward of both roads; of Triton's large blocks, several."""
    n = 9000 if backend == "triton" else 40
    if backend == "triton":
        request.getfixturevalue("launches_of_triton")

    def step() -> None:
        views, s = embeddings(3, dtype, n), torch.empty((), device=CUDA)
        sample_ids = torch.empty(n, dtype=torch.int64, device=CUDA) if ids else None
        pairs = ((0, 1), (0, 2), (1, 2), (2, 2))
        options = {"own_pairs": pairs, "compute_dtype": dtype, "backend": backend}
        mixing = torch.empty(3, 2, device=CUDA)
        for mixed, bases in ((None, views), (MIXED, views[:2])):
            spec, needs = spec_of(mixed=mixed, **options), [True] * (len(bases) + 2)
            of_mixed = None if mixed is None else mixing
            results = run_forward(bases, spec, needs, s, sample_ids, of_mixed)
            assert {x.device for x in results} == {CUDA}  # else one CUDA graph could not hold it
            run_backward(bases, spec, needs, s, results, sample_ids)

    operations(step)


def test_would_see_a_copy(operations):
    def step() -> None:
        x = torch.empty(3, 3, device=CUDA)
        for _ in range(10):
            x = x + 1
        x[0, 0] = 0.5

    with pytest.raises(AssertionError, match="aten::copy_"):
        operations(step)


@pytest.mark.parametrize(
    "rows",
    [
        [[0.0, -0.5], [-0.5, 0.0]],
        [[0.0, 1, 1], [1, 0, 1], [1, 1, 0]],
        [[0.0, 2, 1], [3, 4, 1], [1, 1, 0]],
        [[1.0, 1], [1, 1]],
        [[5.0, 5], [5, 6]],
    ],
)
def test_constant_tables_are_filled_where_they_are(rows, monkeypatch):
    class Elsewhere:
        """The CPU, as a device to which a table would have to be copied."""

        type = "elsewhere"

    full = torch.full
    monkeypatch.setattr(
        torch, "full", lambda *given, device, **named: full(*given, device="cpu", **named)
    )
    table = terms.make_table(rows, torch.float32, Elsewhere())
    assert table.tolist() == rows
