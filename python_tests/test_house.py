"""The rooms and the direction in which they may use each other."""

from __future__ import annotations

import ast
from pathlib import Path

import gcl_kernels

ROOT = Path(gcl_kernels.__file__).parent

LAYERS = [
    "spec",
    "blocks",
    "problem",
    "embeddings",
    "backends",
    "dispatch",
    "operators",
    "distributed",
    "negatives",
    "score_fusion",
    "losses",
    "integrations",
]
"""Each may import those before it."""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "gcl_kernels" and len(parts) > 1 else None


def test_data_flows_one_way():
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).with_suffix("").parts[0]
        if here not in LAYERS:
            continue
        for name in imported(path):
            there = room(name)
            if there in LAYERS and there != here:
                assert LAYERS.index(there) < LAYERS.index(here), f"{path}: imports {name}"


def test_backends_do_not_import_each_other():
    folder = ROOT / "backends"
    for path in folder.rglob("*.py"):
        here = path.relative_to(folder).with_suffix("").parts[0]
        for name in imported(path):
            parts = name.split(".")
            if parts[:2] == ["gcl_kernels", "backends"] and len(parts) > 2:
                assert parts[2] == here, f"{path}: imports {name}"
        if here not in ("triton", "__init__"):
            assert not any(name.split(".")[0] == "triton" for name in imported(path))


def test_public_names():
    assert set(gcl_kernels.__all__) == {
        "GCLLoss",
        "backends",
        "clip_loss",
        "gcl_loss",
        "multiview_contrastive_loss",
        "neg_lse",
        "nt_xent_loss",
    }
    for name in gcl_kernels.__all__:
        assert getattr(gcl_kernels, name).__doc__
    assert list(gcl_kernels.backends())[0] == "reference"
