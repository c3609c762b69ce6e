"""torch.compile, the operators' registrations, and what a compiled step computes."""

from __future__ import annotations

import pytest
import torch
import torch.compiler.config
from calls import MIXED, mixing_of, spec_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import gcl_kernels


@pytest.fixture(autouse=True)
def fresh_dynamo():
    # Its cache on disk is keyed by the graph, which does not show the block sizes patched here.
    torch.compiler.config.force_disable_caches = True
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.compiler.config.force_disable_caches = False


def views_of(count: int, n: int = 33, d: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, d, generator=generator).requires_grad_() for _ in range(count)]


FUNCTIONS = {
    "gcl": lambda e, s: gcl_kernels.gcl_loss(*e, s),
    "gcl, fused by addition": lambda e, s: gcl_kernels.gcl_loss(e[0], e[1], None, s),
    "gcl, all options": lambda e, s: gcl_kernels.gcl_loss(
        *e,
        s,
        self_similarity="keep",
        other_positives="exclude",
        reduction="sum",
        pair_weights=[[0, 1, 2], [1, 0, 1], [0, 1, 0]],
        candidates=[[1, 1, 0], [1, 1, 1], [0, 1, 1]],
        sample_ids=torch.arange(e[0].shape[0]) // 2,
    ),
    "gcl, temperature": lambda e, s: gcl_kernels.gcl_loss(*e, temperature=0.1) + 0 * s,
    "clip": lambda e, s: gcl_kernels.clip_loss(e[0], e[1], s),
    "nt_xent": lambda e, s: gcl_kernels.nt_xent_loss(e[0], e[1], s),
    "gcl, one tensor twice": lambda e, s: gcl_kernels.gcl_loss(e[0], e[0], e[1], s),
    "gcl, fused, one tensor twice": lambda e, s: gcl_kernels.gcl_loss(e[0], e[0], None, s),
    "reference": lambda e, s: gcl_kernels.gcl_loss(*e, s, backend="reference"),
    "neg_lse": lambda e, s: gcl_kernels.neg_lse(
        e, s, sample_ids=torch.arange(e[0].shape[0]) // 2
    ).mean(),
}


GENERATED = ("neg_lse",)
"""Through the default compiler, as score fusion below. The others take its way as far as the graph
of operators, forwards and backwards, and leave out the C++ around them, which is not of this
package and takes up to ten seconds each."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_full_graph_gives_the_eager_numbers(name, ragged):
    function = FUNCTIONS[name]
    backend = "inductor" if name in GENERATED else "aot_eager_decomp_partition"

    def run(f):
        views = views_of(3)
        s = torch.tensor(15.0, requires_grad=True)
        loss = f(views, s)
        loss.backward()
        return [loss.detach(), s.grad, *(v.grad for v in views)]

    compiled_function = torch.compile(function, fullgraph=True, backend=backend)
    for eager, compiled in zip(run(function), run(compiled_function), strict=True):
        if eager is None:
            assert compiled is None
        else:
            size = eager.abs().max().item()
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6 * size)


LOSSES = {
    "clip": lambda e: gcl_kernels.clip_loss(*e[:2]),
    "gcl": lambda e: gcl_kernels.gcl_loss(*e[:3]),
    "gcl, fused by addition": lambda e: gcl_kernels.gcl_loss(*e[:2]),
    "module": lambda e: gcl_kernels.GCLLoss()(*e[:2]),
    "neg_lse of 1": lambda e: gcl_kernels.neg_lse(e[:1]).sum(),
    "neg_lse of 4": lambda e: gcl_kernels.neg_lse(e[:4]).sum(),
    "6 views": lambda e: gcl_kernels.multiview_contrastive_loss(e),
}


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_gradient(name):
    """A validation step: under either mode, and with embeddings that need no gradient."""
    function = LOSSES[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    views = views_of(6)
    expected = function(views)
    with torch.no_grad():
        for run in (function, compiled):
            torch.testing.assert_close(run(views), expected.detach())
    with torch.inference_mode():
        for run in (function, compiled):
            torch.testing.assert_close(run(views), expected.detach())
    constant = [view.detach() for view in views]
    for run in (function, compiled):
        loss = run(constant)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())
    grads = [torch.autograd.grad(run(views), views[0]) for run in (function, compiled)]
    torch.testing.assert_close(*grads)


MODULE = gcl_kernels.GCLLoss()
SCHEDULES = {
    "logit_scale": lambda e, s: gcl_kernels.clip_loss(*e, s),
    "temperature": lambda e, s: gcl_kernels.gcl_loss(*e, temperature=1 / s),
    "module": lambda e, s: MODULE(*e, None, s),
    "reference": lambda e, s: gcl_kernels.nt_xent_loss(*e, s, backend="reference"),
    "fusion_weights": lambda e, s: gcl_kernels.gcl_loss(*e, fusion_weights=(s, 1.0)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_compiles_twice(name):
    """Once for the first number, once for any: as dense PyTorch."""
    function, counter = SCHEDULES[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    views = views_of(2)
    for step in range(12):
        scale = 10 + 0.37 * step
        results = [run(views, scale) for run in (compiled, function)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r, views) for r in results))
    assert counter.frame_count <= 2


def test_a_changed_attribute_compiles_twice():
    module, counter = gcl_kernels.GCLLoss(), CompileCounterWithBackend("aot_eager")
    compiled, views = torch.compile(module, fullgraph=True, backend=counter), views_of(2)
    for step in range(12):
        module.temperature = 0.1 / (1 + step)
        torch.testing.assert_close(compiled(*views), module(*views))
    assert counter.frame_count <= 2


def test_dynamic_shapes_and_a_changing_temperature():
    @torch.compile(fullgraph=True, dynamic=True)
    def function(a, b, temperature):
        return gcl_kernels.gcl_loss(a, b, temperature=temperature)

    for n in (8, 21, 64):
        for temperature in (0.07, 0.1, 0.5):
            a, b = views_of(2, n)
            loss = function(a, b, temperature)
            expected = gcl_kernels.gcl_loss(a, b, temperature=temperature)
            torch.testing.assert_close(loss, expected)
            for x, y in zip(
                *(torch.autograd.grad(v, (a, b)) for v in (loss, expected)), strict=True
            ):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_module_and_autocast():
    module = gcl_kernels.GCLLoss(learnable_scale=True)
    # Dynamo and autocast meet before the graph: no code generation.
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    views = views_of(3)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = compiled(*views)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, module(*views))


@pytest.mark.parametrize("num_views", [2, 3])
def test_exported_for_batches_of_any_size(num_views):
    module = gcl_kernels.GCLLoss(learnable_scale=True)
    samples = torch.export.Dim("samples", min=2, max=4096)
    example = tuple(v.detach() for v in views_of(num_views))
    shapes = {"e_i": {0: samples}, "e_t": {0: samples}}
    shapes |= {"e_it": {0: samples}} if num_views == 3 else {}
    exported = torch.export.export(module, example, dynamic_shapes=shapes).module()
    for n in (5, 900):  # one block, and several
        views = [v.detach() for v in views_of(num_views, n)]
        loss = exported(*views)
        torch.testing.assert_close(loss, module(*views))
    with pytest.raises(NotImplementedError, match="torch.export"):
        loss.backward()


@pytest.mark.parametrize("mixed", [None, MIXED], ids=["views", "fused"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("ids", "compute_dtype"), [(None, torch.float32), (torch.arange(12) // 2, torch.float64)]
)
def test_opcheck(mixed, normalize, ids, compute_dtype):
    views = [v.detach() for v in views_of(3, 12)]
    scale = torch.tensor(3.0, dtype=compute_dtype)
    changes = {
        "own_pairs": ((0, 0), (0, 1)),
        "normalize": normalize,
        "compute_dtype": compute_dtype,
    }
    spec = spec_of(candidates=((True, True, False),) * 3, mixed=mixed, **changes)
    bases = views if mixed is None else views[:2]
    every = [*[True] * len(bases), mixed is not None, True]
    for needs in (every, [True, *[False] * len(bases), True]):
        forward = (bases, mixing_of(spec), scale, [ids], spec.text(), needs)
        opcheck(torch.ops.gcl_kernels.neg_lse.default, forward)
        neg_lse, own_logits, *saved = torch.ops.gcl_kernels.neg_lse(*forward)
        upstream = torch.rand_like(neg_lse), torch.rand_like(own_logits)
        backward = (bases, scale, [ids], [*saved, neg_lse], *upstream, spec.text(), needs)
        opcheck(torch.ops.gcl_kernels.neg_lse_backward.default, backward)


@pytest.mark.parametrize("mixed", [None, MIXED], ids=["views", "fused"])
def test_opcheck_with_options_on_the_candidates(mixed):
    views = [v.detach() for v in views_of(3, 12)]
    scale, n = torch.tensor(3.0), 12
    spec = spec_of(mixed=mixed, extra_anchors=(True, False, True), extra_grad=True)
    bases = views if mixed is None else views[:2]
    needs = [*[True] * len(bases), mixed is not None, True]
    data = [torch.arange(n) // 2, torch.randn(3, n), torch.rand(3, n)]
    data += [torch.randn(5, views[0].shape[1]), torch.arange(5), None]
    forward = (bases, mixing_of(spec), scale, data, spec.text(), needs)
    opcheck(torch.ops.gcl_kernels.neg_lse.default, forward)
    neg_lse, own_logits, *saved = torch.ops.gcl_kernels.neg_lse(*forward)
    upstream = torch.rand_like(neg_lse), torch.rand_like(own_logits)
    backward = (bases, scale, data, [*saved, neg_lse], *upstream, spec.text(), needs)
    opcheck(torch.ops.gcl_kernels.neg_lse_backward.default, backward)
