"""``gcl_kernels.warmup``: what a run will launch is compiled before, and nothing beside."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import starts
from stub_driver import COMPILER, activate, build, run_on_stub
from test_triton_launch import on_sm_90

import gcl_kernels

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gcl": ("gcl_loss", {}),
    "gcl, forward": ("gcl_loss", {"requires_grad": False}),
    "gcl, one view frozen": ("gcl_loss", {"requires_grad": (True, True, False)}),
    "clip": ("clip_loss", {"num_views": 2}),
    "clip, ids": ("clip_loss", {"num_views": 2, "sample_ids": True}),
    "fused": ("gcl_loss", {"num_views": 2}),
}
SIZES = [1424, 333]
"""Several blocks of large tiles, and a last batch of small ones whose length is no multiple."""

EXPECTED = {
    # embed, stats (on the diagonal, off it; small), fold, weights (the same), gradients
    "gcl": 9,
    "gcl, forward": 5,
    "gcl, one view frozen": 10,
    "clip": 7,
    "clip, ids": 7,
    # embed, fused_stats and fused_weights as above, fold, inner, gradients
    "fused": 8,
    "module": 8,
}


def main(folder: str) -> None:
    """In a process of its own: for each run what the warm-up would compile, and the run then."""
    activate(Path(folder))
    on_sm_90()
    from calls import half_on_a_gpu
    from triton import knobs

    from gcl_kernels import losses

    losses.resolve_compute_dtype = half_on_a_gpu
    asked: set[Any] = set()

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        asked.add((fn.name, key))
        return True  # neither compiled nor launched

    knobs.runtime.jit_cache_hook = note
    for run, (name, options) in RUNS.items():
        asked.clear()
        loss = functools.partial(getattr(gcl_kernels, name), backend="triton")
        gcl_kernels.warmup(loss, SIZES, 64, device="cpu", **options)
        warmed = set(asked)
        asked.clear()
        for n in SIZES:
            views = [torch.zeros(n, 64, dtype=torch.bfloat16) for _ in range(3)]
            views = views[: options.get("num_views", 3)]
            needs = options.get("requires_grad", True)
            needs = [needs] * len(views) if isinstance(needs, bool) else needs
            for view, needed in zip(views, needs, strict=True):
                view.requires_grad_(needed)
            named = {"sample_ids": torch.arange(n)} if options.get("sample_ids") else {}
            scale = torch.ones((), requires_grad=any(needs))
            value = loss(*views, logit_scale=scale, **named)
            if any(needs):
                value.backward()
        names = sorted(name for name, _ in warmed)
        print(json.dumps([run, len(warmed), warmed == asked, names]))
    module = gcl_kernels.GCLLoss(learnable_scale=True, backend="triton")
    asked.clear()
    gcl_kernels.warmup(module, SIZES, 64, device="cpu", num_views=2)
    print(json.dumps(["module", len(asked), module.log_logit_scale.grad is None, []]))


@starts
def test_a_run_needs_what_was_compiled_before_and_no_more(tmp_path: Path):
    if COMPILER is None:
        pytest.skip("no C compiler to make a driver with: cc, gcc or clang")
    build(tmp_path)
    found = {}
    for line in run_on_stub(tmp_path, "test_warmup", "main").splitlines():
        run, count, complete, names = json.loads(line)
        assert complete, (run, names)
        found[run] = count
    assert found == EXPECTED


def refuse(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("was called")


def test_it_returns_at_once_where_nothing_is_compiled():
    assert gcl_kernels.warmup(refuse, [8192, 100], 768, device="cpu").kernels == 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 8), {}, ValueError, "num_samples: expected an integer >= 1, got 0"),
        (([4, "a"], 8), {}, TypeError, "num_samples: expected an integer, got 'a'"),
        ((4, 0), {}, ValueError, "dim"),
        ((4, 8, torch.int8), {}, TypeError, "dtype"),
        ((4, 8), {"requires_grad": [True]}, ValueError, "requires_grad: expected a bool or 3"),
    ],
)
def test_malformed_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gcl_kernels.warmup(refuse, *arguments, device="cpu", **options)
