"""Malformed arguments: one line that names the argument, what was expected and what came."""

from __future__ import annotations

import copy
import re
import typing
import warnings

import numpy as np
import pytest
import torch
from processes import run_fresh

import gcl_kernels
from gcl_kernels import GCLLoss, clip_loss, gcl_loss, multiview_contrastive_loss, neg_lse

E = torch.randn(4, 8)
TABLE = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


class DTensor(torch.Tensor):
    """Stands for torch.distributed's, which needs a process group to exist."""


CASES = {
    "N differs": (
        lambda: gcl_loss(E, torch.randn(5, 8)),
        ValueError,
        r"e_t: expected shape \[4, 8\].*\[5, 8\]",
    ),
    "D differs": (
        lambda: gcl_loss(E, E, torch.randn(4, 9)),
        ValueError,
        r"e_it: expected.*\[4, 9\]",
    ),
    "N is 0": (lambda: gcl_loss(E[:0], E[:0]), ValueError, r"e_i: expected N >= 1.*\[0, 8\]"),
    "D is 0": (lambda: gcl_loss(E[:, :0], E[:, :0]), ValueError, r"D >= 1.*\[4, 0\]"),
    "1-D": (lambda: gcl_loss(E[0], E), ValueError, r"e_i: expected a 2-D.*1-D shape \[8\]"),
    "scale in the place of e_it": (
        lambda: gcl_loss(E, E, torch.tensor(10.0)),
        TypeError,
        r"e_it: expected a 2-D.*fourth argument",
    ),
    "number in the place of e_it": (
        lambda: gcl_loss(E, E, 10),
        TypeError,
        r"e_it: expected a 2-D.*fourth argument",
    ),
    "integers": (
        lambda: gcl_loss(E, E.long()),
        TypeError,
        r"e_t: expected dtype float64.*torch.int64",
    ),
    "complex": (lambda: gcl_loss(E, E.cfloat()), TypeError, r"e_t: expected dtype.*complex64"),
    "no tensor": (lambda: gcl_loss(E, [1.0]), TypeError, r"e_t: expected a tensor.*list"),
    "sparse": (lambda: gcl_loss(E.to_sparse(), E), TypeError, r"e_i: expected a dense tensor"),
    "DTensor": (
        lambda: gcl_loss(E, E.as_subclass(DTensor)),
        TypeError,
        r"e_t: .*DTensor.*to_local",
    ),
    "DTensor as scale": (
        lambda: gcl_loss(E, E, None, torch.tensor(9.0).as_subclass(DTensor)),
        TypeError,
        r"logit_scale: .*DTensor.*to_local",
    ),
    "DTensor as fusion weight": (
        lambda: gcl_loss(E, E, fusion_weights=(torch.tensor(9.0).as_subclass(DTensor), 1.0)),
        TypeError,
        r"fusion_weights\[0\]: .*DTensor.*to_local",
    ),
    "weights to learn": (
        lambda: clip_loss(E, E, pair_weights=torch.ones(2, 2, requires_grad=True)),
        ValueError,
        r"pair_weights: expected constants, got a tensor that requires a gradient",
    ),
    "device": (lambda: clip_loss(E, E.to("meta")), ValueError, r"e_t: expected device cpu.*meta"),
    "negative weight": (
        lambda: gcl_loss(E, E, pair_weights=[[0, -1, 1], *TABLE[1:]]),
        ValueError,
        r"pair_weights: expected finite numbers >= 0, got -1 at \[0\]\[1\]",
    ),
    "infinite weight": (
        lambda: gcl_loss(E, E, pair_weights=[[0, float("inf"), 1], *TABLE[1:]]),
        ValueError,
        r"pair_weights: expected finite.*inf",
    ),
    "NaN weight": (
        lambda: gcl_loss(E, E, pair_weights=[[0, float("nan"), 1], *TABLE[1:]]),
        ValueError,
        r"pair_weights: expected finite.*nan",
    ),
    "zero weights": (
        lambda: gcl_loss(E, E, pair_weights=torch.zeros(3, 3)),
        ValueError,
        r"all zeros",
    ),
    "weight of a view with itself": (
        lambda: gcl_loss(E, E, pair_weights=[[1, 1, 1], *TABLE[1:]]),
        ValueError,
        r"pair_weights: expected a zero diagonal, got 1 at \[0\]\[0\]",
    ),
    "weights of the wrong size": (
        lambda: gcl_loss(E, E, pair_weights=[[0, 1], [1, 0]]),
        ValueError,
        r"pair_weights: expected 3 x 3.*2 rows of lengths \[2, 2\]",
    ),
    "weights whose sum overflows": (
        lambda: clip_loss(E, E, pair_weights=[[0, 1e308], [1e308, 0]]),
        ValueError,
        r"pair_weights: expected weights with a finite sum, got",
    ),
    "weights a flat list": (
        lambda: gcl_loss(E, E, pair_weights=[1.0] * 9),
        TypeError,
        r"pair_weights: expected 3 x 3 numbers, got a row of type float",
    ),
    "weights no table": (
        lambda: gcl_loss(E, E, pair_weights=1.0),
        TypeError,
        r"pair_weights: expected 3 x 3.*float",
    ),
    "candidates no booleans": (
        lambda: gcl_loss(E, E, candidates=[[0.5, 1, 1], *TABLE[1:]]),
        ValueError,
        r"candidates: expected booleans, got 0.5",
    ),
    "row without candidates": (
        lambda: gcl_loss(E, E, candidates=[[0, 0, 0], *TABLE[1:]]),
        ValueError,
        r"candidates: expected at least one true entry in row 0",
    ),
    "both scale and temperature": (
        lambda: gcl_loss(E, E, logit_scale=10.0, temperature=0.1),
        ValueError,
        r"logit_scale, temperature: expected at most one",
    ),
    "temperature 0": (
        lambda: gcl_loss(E, E, temperature=0.0),
        ValueError,
        r"temperature: expected.*got 0.0",
    ),
    "temperature < 0": (
        lambda: gcl_loss(E, E, temperature=-1),
        ValueError,
        r"temperature: expected.*got -1",
    ),
    "temperature whose inverse overflows": (
        lambda: gcl_loss(E, E, temperature=1e-320),
        ValueError,
        r"temperature: expected a number within torch.float32's range, got 1e-320",
    ),
    "scale beyond float32": (
        lambda: gcl_loss(E, E, logit_scale=1e39),
        ValueError,
        r"logit_scale: expected a number within torch.float32's range, got 1e\+39",
    ),
    "scale beyond all floats": (
        lambda: gcl_loss(E.double(), E.double(), logit_scale=10**400),
        ValueError,
        r"logit_scale: expected a number within torch.float64's range, got 1000",
    ),
    "scale NaN": (
        lambda: gcl_loss(E, E, logit_scale=float("nan")),
        ValueError,
        r"logit_scale: .*got nan",
    ),
    "scale of two elements": (
        lambda: gcl_loss(E, E, None, torch.ones(2)),
        ValueError,
        r"logit_scale: .*\[\] or \[1\]",
    ),
    "scale integer tensor": (
        lambda: gcl_loss(E, E, None, torch.tensor(2)),
        TypeError,
        r"logit_scale: .*torch.int64",
    ),
    "scale no number": (
        lambda: gcl_loss(E, E, None, "10"),
        TypeError,
        r"logit_scale: expected a number or a tensor, got str",
    ),
    "scale elsewhere": (
        lambda: gcl_loss(E, E, None, torch.ones((), device="meta")),
        ValueError,
        r"logit_scale: expected device cpu.*meta",
    ),
    "ids float": (
        lambda: gcl_loss(E, E, sample_ids=torch.ones(4)),
        TypeError,
        r"sample_ids: .*float32",
    ),
    "ids list": (lambda: gcl_loss(E, E, sample_ids=[1, 2, 3, 4]), TypeError, r"sample_ids: .*list"),
    "ids of wrong length": (
        lambda: gcl_loss(E, E, sample_ids=torch.arange(3)),
        ValueError,
        r"sample_ids: expected shape \[4\], got \[3\]",
    ),
    "backend": (
        lambda: gcl_loss(E, E, backend="cuda13"),
        ValueError,
        r"backend: expected one of 'auto', .*'reference', 'tiled'.*got 'cuda13'",
    ),
    "reduction": (
        lambda: gcl_loss(E, E, reduction="avg"),
        ValueError,
        r"reduction: .*'none', 'pairs', got 'avg'",
    ),
    "self_similarity": (
        lambda: gcl_loss(E, E, self_similarity="drop"),
        ValueError,
        r"'mask', 'keep', got 'drop'",
    ),
    "other_positives": (
        lambda: gcl_loss(E, E, other_positives=None),
        ValueError,
        r"'exclude', got None",
    ),
    "compute_dtype": (
        lambda: gcl_loss(E, E, compute_dtype=torch.int8),
        ValueError,
        r"compute_dtype: .*int8",
    ),
    "fusion weights": (
        lambda: gcl_loss(E, E, fusion_weights=(1.0,)),
        ValueError,
        r"fusion_weights: expected two",
    ),
    "fusion weight NaN": (
        lambda: gcl_loss(E, E, fusion_weights=(1.0, float("nan"))),
        ValueError,
        r"fusion_weights\[1\]: expected a finite",
    ),
    "complex fusion weight": (
        lambda: gcl_loss(E, E, fusion_weights=(1.0, torch.tensor(1j))),
        TypeError,
        r"fusion_weights\[1\]: expected a floating tensor, got torch.complex64",
    ),
    "normalize no bool": (
        lambda: gcl_loss(E, E, normalize="no"),
        TypeError,
        r"normalize: expected True or False, got 'no'",
    ),
    "ids of an unsigned dtype": (
        lambda: gcl_loss(E, E, sample_ids=torch.arange(4).to(torch.uint16)),
        TypeError,
        r"sample_ids: expected dtype int64, int32, int16, int8 or uint8, got torch.uint16",
    ),
    "views no sequence": (
        lambda: multiview_contrastive_loss(None),
        TypeError,
        r"views: expected a sequence of tensors \[N, D\], got NoneType",
    ),
    "views a number": (
        lambda: neg_lse(5),
        TypeError,
        r"views: expected a sequence of tensors \[N, D\], got int",
    ),
    "one view": (
        lambda: multiview_contrastive_loss([E]),
        ValueError,
        r"views: expected at least 2, got 1",
    ),
    "no view": (lambda: neg_lse([]), ValueError, r"views: expected at least 1, got 0"),
    "module temperature": (
        lambda: GCLLoss(temperature=-0.1),
        ValueError,
        r"temperature: .*got -0.1",
    ),
    "module temperature a tensor": (
        lambda: GCLLoss(temperature=torch.tensor(0.1)),
        TypeError,
        r"temperature: expected a number, got Tensor",
    ),
    "module scale above its bound": (
        lambda: GCLLoss(learnable_scale=True, max_logit_scale=10.0),
        ValueError,
        r"temperature: expected at least 1 / max_logit_scale = 0.1, got 0.07",
    ),
    "module normalize": (
        lambda: GCLLoss(normalize=None),
        TypeError,
        r"normalize: expected True or False, got None",
    ),
    "module dtype": (
        lambda: GCLLoss(compute_dtype="bf16"),
        ValueError,
        r"compute_dtype: expected torch.float64.*got 'bf16'",
    ),
    "module backend": (
        lambda: GCLLoss(backend="gpu"),
        ValueError,
        r"backend: expected one of 'auto'.*got 'gpu'",
    ),
    "module fusion weights": (
        lambda: GCLLoss(fusion_weights=(1.0, "2")),
        TypeError,
        r"fusion_weights\[1\]: expected a number or a tensor, got str",
    ),
    "module option": (lambda: GCLLoss(reduction="max"), ValueError, r"reduction: .*got 'max'"),
    "two scales": (
        lambda: GCLLoss(learnable_scale=True)(E, E, None, torch.tensor(3.0)),
        ValueError,
        r"logit_scale: this module owns",
    ),
}


@pytest.mark.parametrize("call, error, message", CASES.values(), ids=CASES.keys())
def test_message(call, error, message):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text


def test_environment_variable_names_the_automatic_backend(monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_BACKEND", "reference")
    leaf = E.double().requires_grad_()
    (grad,) = torch.autograd.grad(gcl_loss(leaf, E.double()), leaf, create_graph=True)
    torch.autograd.grad(grad.sum(), leaf)
    with pytest.raises(NotImplementedError):
        (grad,) = torch.autograd.grad(
            gcl_loss(leaf, E.double(), backend="tiled"), leaf, create_graph=True
        )
        torch.autograd.grad(grad.sum(), leaf)
    monkeypatch.setenv("GCL_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="GCL_KERNELS_BACKEND: expected one of 'auto'.*'fast'"):
        gcl_loss(E, E)


def test_unavailable_backend_says_why():
    for name, state in gcl_kernels.backends().items():
        if state != "available":
            with pytest.raises(RuntimeError, match=f"backend: '{name}' is not available"):
                gcl_loss(E, E, backend=name)


def test_module_owns_a_bounded_learnable_scale():
    module = GCLLoss(learnable_scale=True, temperature=0.05, max_logit_scale=50.0)
    ((name, parameter),) = module.named_parameters()
    assert name == "log_logit_scale" and parameter.exp().item() == pytest.approx(20)
    torch.testing.assert_close(module(E, E.flip(0)), gcl_loss(E, E.flip(0), logit_scale=20.0))
    module(E, E.flip(0)).backward()
    assert parameter.grad is not None and parameter.grad != 0
    # Beyond its bound it is used at the bound, and goes on learning.
    with torch.no_grad():
        parameter.fill_(10.0)
    parameter.grad = None
    at_bound = torch.tensor(50.0, requires_grad=True)
    expected = gcl_loss(E, E.flip(0), None, at_bound)
    loss = module(E, E.flip(0))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert parameter.exp().item() == pytest.approx(50)
    torch.testing.assert_close(parameter.grad, 50 * at_bound.grad.reshape(1))
    plain = GCLLoss()
    assert not list(plain.parameters())
    torch.testing.assert_close(plain(E, E.flip(0)), gcl_loss(E, E.flip(0), temperature=0.07))
    ids = torch.tensor([0, 0, 1, 2])
    torch.testing.assert_close(
        plain(E, E.flip(0), E + 1, 3.0, sample_ids=ids),
        gcl_loss(E, E.flip(0), E + 1, 3.0, sample_ids=ids),
    )


def test_module_made_on_the_meta_device():
    with torch.device("meta"):
        module = GCLLoss(temperature=0.05, learnable_scale=True)
    module.to_empty(device="cpu").reset_parameters()
    assert module.log_logit_scale.exp().item() == pytest.approx(20)


def test_module_owns_the_fusion_weights_that_are_parameters():
    alpha = torch.nn.Parameter(torch.tensor(0.5))
    module = copy.deepcopy(GCLLoss(fusion_weights=(alpha, 2.0)))
    ((name, parameter),) = module.double().named_parameters()
    assert name == "alpha" and parameter is not alpha and parameter.dtype == torch.float64
    e_t = E.flip(0).double()
    module(E.double(), e_t).backward()
    expected = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    gcl_loss(E.double(), e_t, fusion_weights=(expected, 2.0)).backward()
    torch.testing.assert_close(parameter.grad, expected.grad)


NUMBERS = (np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), np.array([0.5])[0])


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_numpy_numbers(number):
    """Where a Python number goes: scales, temperatures, weights, tables of numbers or objects."""
    flipped, table = E.flip(0), [[0, 0.5, 1], [1, 0, 1], [1, 1, 0]]
    options = [
        {"temperature": number},
        {"logit_scale": np.int64(14)},
        {"fusion_weights": (number, 1)},
        {"pair_weights": [[0, number, np.int32(1)], *table[1:]]},
        {"pair_weights": np.array(table, dtype=np.float32)},
        {"candidates": [[np.bool_(True)] * 3] * 3},
    ]
    plain = [
        {"temperature": 0.5},
        {"logit_scale": 14},
        {"fusion_weights": (0.5, 1.0)},
        {"pair_weights": table},
        {"pair_weights": table},
        {},
    ]
    for given, expected in zip(options, plain, strict=True):
        assert torch.equal(gcl_loss(E, flipped, **given), gcl_loss(E, flipped, **expected))
    module = GCLLoss(temperature=number, fusion_weights=(number, np.float32(2)))
    assert torch.equal(
        module(E, flipped), gcl_loss(E, flipped, temperature=0.5, fusion_weights=(0.5, 2.0))
    )


def test_a_temperature_given_as_a_scale_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(5):
            gcl_loss(E, E, None, 0.07 + 0.01 * step)
            clip_loss(E, E, temperature=2.0 + step)
        # Dot products of any length may need a small scale, and a tensor is not read.
        gcl_loss(E, E, None, 0.07, normalize=False)
        gcl_loss(E, E, None, torch.tensor(0.07))
    (warning,) = caught
    assert "for a temperature pass temperature=..." in str(warning.message)


def test_signatures_can_be_read():
    """By tools that build objects from configuration files."""
    for name in gcl_kernels.__all__:
        of = getattr(gcl_kernels, name)
        hints = typing.get_type_hints(of.__init__ if isinstance(of, type) else of)
        assert "backend" not in hints or "triton" in typing.get_args(hints["backend"])


def test_module_shows_its_options():
    assert repr(GCLLoss()) == "GCLLoss(temperature=0.07)"
    module = GCLLoss(
        temperature=0.05,
        learnable_scale=True,
        normalize=False,
        other_positives="exclude",
        fusion_weights=(torch.nn.Parameter(torch.tensor(1.0)), 0.5),
        compute_dtype=torch.bfloat16,
        group="world",
    )
    assert repr(module) == (
        "GCLLoss(temperature=0.05, learnable_scale=True, max_logit_scale=100.0, normalize=False, "
        "other_positives='exclude', fusion_weights=('Parameter', 0.5), "
        "compute_dtype=torch.bfloat16, group='world')"
    )


def test_import_without_triton():
    """Where `import triton` fails, the package imports and the tiled path runs."""
    run_fresh(
        "import sys, importlib.abc, torch\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'triton']:\n"
        "    del sys.modules[name]\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ImportError('blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import gcl_kernels\n"
        "e = torch.randn(4, 8, requires_grad=True)\n"
        "gcl_kernels.gcl_loss(e, e.detach().flip(0)).backward()\n"
        "assert 'triton' not in sys.modules\n"
        "assert gcl_kernels.backends()['tiled'] == 'available'\n"
    )
