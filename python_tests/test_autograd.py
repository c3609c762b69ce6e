"""What PyTorch lets one do around a loss: checkpointing, hooks, inference tensors, transforms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contract import random_views
from processes import run_fresh
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import gcl_kernels

LOSSES = {
    "clip": lambda a, b, c, **options: gcl_kernels.clip_loss(a, b, **options) + 0 * c.sum(),
    "nt_xent": lambda a, b, c, **options: gcl_kernels.nt_xent_loss(a, b, **options) + 0 * c.sum(),
    "gcl": gcl_kernels.gcl_loss,
    "fused": lambda a, b, c, **options: gcl_kernels.gcl_loss(a, b, **options) + 0 * c.sum(),
    "multiview": lambda a, b, c, **options: gcl_kernels.multiview_contrastive_loss(
        [a, b, c, a + b], **options
    ),
    "neg_lse": lambda a, b, c, **options: gcl_kernels.neg_lse((a, b, c), **options).sum(),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def leaves_of(device, n=12, d=6):
    return [v.float().requires_grad_() for v in random_views(n, d, device)]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layers", [False, True])
def test_checkpointed(backend, device, loss, use_reentrant, layers):
    """The loss alone in the region, and behind a layer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6, device=device) if layers else torch.nn.Identity()

    def step(*views):
        return loss(*map(layer, views), backend=backend)

    leaves = leaves_of(device)
    wanted = [*leaves, *layer.parameters()]
    expected = torch.autograd.grad(step(*leaves), wanted)
    checkpoint(step, *leaves, use_reentrant=use_reentrant).backward()
    for got, want in zip(wanted, expected, strict=True):
        torch.testing.assert_close(got.grad, want)


@pytest.mark.parametrize("policy", CheckpointPolicy)
def test_selectively_checkpointed(backend, device, loss, policy):
    contexts = partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)
    leaves = leaves_of(device)
    step = partial(loss, backend=backend)
    expected = torch.autograd.grad(step(*leaves), leaves)
    result = checkpoint(step, *leaves, use_reentrant=False, context_fn=contexts)
    for got, want in zip(torch.autograd.grad(result, leaves), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_each_saved_tensor_is_unpacked_once(backend, device, loss):
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (len(unpacked), unpacked.append(0), tensor), lambda packed: count(*packed)
    ):

        def count(index, _, tensor):
            unpacked[index] += 1
            return tensor

        leaves = leaves_of(device)
        loss(*leaves, backend=backend).backward()
    assert unpacked and max(unpacked) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_inference_tensors(backend, device, loss, dtype, normalize):
    """Frozen embeddings, ids and scale that torch.inference_mode made."""
    shown = [v.to(dtype) for v in random_views(12, 6, device)]
    ids, scale = torch.arange(12, device=device) // 2, torch.tensor(2.0, device=device)
    with torch.inference_mode():
        made = [tensor.clone() for tensor in (*shown, ids, scale)]
    assert all(tensor.is_inference() for tensor in made)
    results = []
    for _, b, c, of_samples, logit_scale in ((*shown, ids, scale), made):
        a = shown[0].clone().requires_grad_()
        options = {"sample_ids": of_samples, "normalize": normalize, "backend": backend}
        result = loss(a, b, c, logit_scale=logit_scale, **options)
        results.append((result, torch.autograd.grad(result, a)[0]))
    assert all(map(torch.equal, *results))


def test_inference_tensors_in_a_compiled_step(device):
    shown = [v.float() for v in random_views(12, 6, device)]
    with torch.inference_mode():
        frozen = shown[1].clone()
    a = shown[0].requires_grad_()
    for function in (gcl_kernels.gcl_loss, gcl_kernels.clip_loss):
        loss = torch.compile(function, fullgraph=True, backend="aot_eager")(a, frozen)
        expected = torch.autograd.grad(function(a, shown[1]), a)
        torch.testing.assert_close(torch.autograd.grad(loss, a), expected)


def test_fusion_weights_made_in_inference_mode(backend, device):
    e_i, e_t, _ = leaves_of(device)
    with torch.inference_mode():
        weight = torch.tensor(0.5, device=device)
    gcl_kernels.gcl_loss(e_i, e_t, fusion_weights=(weight, 1.0), backend=backend).backward()
    assert e_i.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_embeddings_beside_learned_fusion_weights(backend, device, dtype):
    """Made in inference mode, they are factors of a gradient."""
    shown = [v.to(dtype) for v in random_views(12, 6, device)[:2]]
    with torch.inference_mode():
        made = [view.clone() for view in shown]
    results = []
    for views in (shown, made):
        weights = [torch.tensor(w, device=device, requires_grad=True) for w in (0.7, 1.3)]
        loss = gcl_kernels.gcl_loss(*views, fusion_weights=weights, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, weights)])
    assert all(map(torch.equal, *results))


def _tangent(function, a):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(a, torch.ones_like(a)))).tangent


TRANSFORMS = {
    "grad": lambda f, a: torch.func.grad(f)(a),
    "vmap": lambda f, a: torch.func.vmap(f)(a.unsqueeze(0)),
    "jvp": lambda f, a: torch.func.jvp(f, (a,), (torch.ones_like(a),))[1],
    "jacrev": lambda f, a: torch.func.jacrev(f)(a),
    "hessian": lambda f, a: torch.func.hessian(f)(a),
    "forward mode": _tangent,
    "jacobian": lambda f, a: torch.autograd.functional.jacobian(f, a, vectorize=True),
    "batched": lambda f, a: torch.autograd.grad(
        f(leaf := a.clone().requires_grad_()).expand(2),
        leaf,
        torch.eye(2, device=a.device),
        is_grads_batched=True,
    )[0],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["clip", "gcl", "fused"])
def test_transforms(backend, device, name, transform):
    """The reference's are right; of the others' tensors a kernel would find no memory."""
    a, b, c = (v.float() for v in random_views(5, 3, device))

    def function(x):
        return LOSSES[name](x, b, c, backend=backend)

    if backend != "reference":
        with pytest.raises(NotImplementedError, match="backend='reference' only"):
            TRANSFORMS[transform](function, a)
        return
    result = TRANSFORMS[transform](function, a)
    leaf = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    expected = {
        "vmap": function(a).unsqueeze(0),
        "jvp": gradient.sum(),
        "forward mode": gradient.sum(),
        "batched": torch.stack([gradient] * 2),
        "hessian": torch.autograd.functional.hessian(function, a),
    }.get(transform, gradient)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_tangent_elsewhere_is_no_hindrance(device):
    a, b, _ = (v.float() for v in random_views(5, 3, device))
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(2), torch.ones(2))
        loss = gcl_kernels.clip_loss(a, b)
    assert torch.equal(loss, gcl_kernels.clip_loss(a, b))


def test_a_trace_is_refused(backend, device, loss):
    """It would hold this batch's number of samples."""
    views = [v.detach() for v in leaves_of(device)]
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace: expected torch\.compile"):
        torch.jit.trace(lambda *views: loss(*views, backend=backend), tuple(views))


@pytest.mark.parametrize(
    ("name", "products"), [("clip", 2), ("nt_xent", 4), ("fused", 4), ("gcl", 9)]
)
@pytest.mark.parametrize("n", [16, 2400])
def test_counted_operations(name, products, n):
    """M^2 D forward; backward 2 M^2 D, and M^2 D less the tiles that were kept."""
    d, leaves = 4, leaves_of(torch.device("cpu"), n, 4)
    step = partial(LOSSES[name], backend="tiled")
    with FlopCounterMode(display=False) as forward:
        loss = step(*leaves)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        step(*leaves)
    counts = [counter.get_total_flops() / (n * n * d) for counter in (forward, backward, alone)]
    assert counts[0] == counts[2] == products
    again = max(0, products - 2 * (7 << 20) / n**2) if n > 16 else 0
    assert counts[1] == pytest.approx(2 * products + again, rel=1e-6)


def test_counted_whichever_is_imported_first():
    """A counter copies the formulas known when it is made."""
    code = (
        "import torch, gcl_kernels\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "e = torch.randn(4, 8, requires_grad=True)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    gcl_kernels.clip_loss(e, e.detach()).backward()\n"
        "print(counter.get_total_flops())\n"
    )
    assert run_fresh(code).strip() == str((2 + 2) * 4 * 4 * 8)
