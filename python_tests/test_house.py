"""The rooms, the direction in which they may use each other, and what a room may look like."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_fresh

import gcl_kernels

ROOT = Path(gcl_kernels.__file__).parent

LAYERS = [
    "spec",
    "blocks",
    "problem",
    "backends",
    "dispatch",
    "distributed",
    "roads",
    "extra",
    "passes",
    "operators",
    "terms",
    "positives",
    "losses",
    "ranks",
    "warming",
    "integrations",
    "retrieval",
]
"""Each may import those before it."""

BESIDE = {"__init__", "flops"}
"""The public names; what a counter of operations imports."""

FOLDERS = {
    "backends": ["base"],
    "roads": ["base", "fused", "views"],
    "integrations": [],
    "retrieval": [
        *("datasets", "files", "text", "mbeir", "mmeb", "covr", "coco"),
        *("store", "encode", "encoders", "checkpoints", "search", "metrics", "evaluation"),
        *("report", "mteb"),
    ],
}
"""Of a folder the modules that others in it may import, themselves only what stands before them.
Backends know each other as little as integrations do."""


def modules() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every file, and its name in parts below the package."""
    for path in sorted(ROOT.rglob("*.py")):
        yield path, path.relative_to(ROOT).with_suffix("").parts


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Names in parts: of what a file imports at any place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield (*node.module.split("."), alias.name)
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)


def test_data_flows_one_way():
    """Which leaves no circle, either."""
    rooms = {parts[0] for _, parts in modules()}
    assert rooms == {*LAYERS, *BESIDE}
    for path, (here, *within) in modules():
        if here in BESIDE:
            continue
        for package, *parts in imported(path):
            if package != "gcl_kernels" or not parts:  # the public names, for an integration
                continue
            there, *rest = parts
            if there != here:
                assert LAYERS.index(there) < LAYERS.index(here), f"{path}: imports {there}"
                assert here != "retrieval" or there == "integrations", f"{path}: imports {there}"
            elif within[0] != rest[0]:  # other files of a backend's own folder are its own
                order = [*FOLDERS[here], within[0]]
                assert order.index(rest[0]) < order.index(within[0]), f"{path}: imports {rest[0]}"


HEAVY = {
    "triton": {"triton"},
    "transformers": {"checkpoints", "tinyclip", "vista"},
    "open_clip": {"checkpoints", "open_clip"},
    "sentence_transformers": {"sentence_transformers"},
    "timm": {"vista"},
}
"""Packages, and the files and folders that may import them."""


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_where_they_are_needed(package):
    for path, (here, *within) in modules():
        if not HEAVY[package] & {here, *within}:
            assert not any(name[0] == package for name in imported(path)), path


def test_the_package_imports_nothing_heavy():
    """In a fresh process: PyTorch, and of what belongs to it no compiler."""
    code = "import torch, sys; before = set(sys.modules)\nimport gcl_kernels\n"
    code += "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
    code += "print(*{'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    first, compilers = run_fresh(code).split("\n")[:2]
    ours = {"gcl_kernels"}
    standard = set(sys.stdlib_module_names) | {"torch"}
    assert set(first.split()) - standard == ours
    assert not compilers.split()


def parameters(function: ast.FunctionDef) -> list[str]:
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return [of.arg for of in every if of.arg not in ("self", "cls")]


def test_no_function_takes_more_than_eight_parameters():
    """But the public losses, in whatever form, `evaluate`, and kernels."""
    public = {*gcl_kernels.__all__, "evaluate"}
    for path, (here, *_) in modules():
        tree = ast.parse(path.read_text())
        of_losses = {
            id(method)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and (here == "integrations" or node.name in public)
            for method in node.body
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name in public:
                continue
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not (kernel or id(node) in of_losses):
                assert len(parameters(node)) <= 8, f"{path}: {node.name}"


def test_public_names():
    assert set(gcl_kernels.__all__) == {
        "GCLLoss",
        "backends",
        "clip_loss",
        "gcl_loss",
        "hits",
        "multiview_contrastive_loss",
        "neg_lse",
        "nt_xent_loss",
        "positive_ranks",
        "watch_ranks",
        "warmup",
    }
    for name in gcl_kernels.__all__:
        assert getattr(gcl_kernels, name).__doc__
    assert list(gcl_kernels.backends())[0] == "reference"
