"""The figures: heat maps, PCA, similarity histograms, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gcl_kernels.retrieval.datasets import MODALITIES

from .evaluate import CUTOFFS, Embeddings
from .report import MODELS, Hits
from .train import History

LOSS_COLOURS = {"CL": "#7f7f7f", "GCL": "#c2185b"}
MODALITY_COLOURS = {"i": "#0072b2", "t": "#e69f00", "it": "#009e73"}
MODALITY_NAMES = {"i": "image", "t": "text", "it": "fused"}
HEAT_MAP_CUTOFF = CUTOFFS.index(5)
DOTS_PER_INCH = 110

plt.rcParams.update(
    {
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Write a figure with few colours' worth of bytes and forget it."""
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def heat_maps(title: str, hits: Hits, path: Path) -> None:
    """hit@5 of the nine tasks, both pools, for each model and the difference of the losses."""
    pools = {"local": "local pool", "union": "union pool"}
    figure, axes = plt.subplots(2, 4, figsize=(12.4, 6.4))
    for row, (pool, pool_name) in enumerate(pools.items()):
        found = {model: hits[model][pool][..., HEAT_MAP_CUTOFF] for model in MODELS}
        columns = {**found, "GCL \u2212 CL": found["GCL"] - found["CL"]}
        top = max(values.mean(0).max() for values in found.values())
        for axis, (name, values) in zip(axes[row], columns.items(), strict=True):
            difference = name not in MODELS
            mean = values.mean(0)
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            limit = max(10.0, np.abs(mean).max()) if difference else top
            colours = {"cmap": "RdBu", "vmin": -limit} if difference else {"cmap": "Greys"}
            axis.imshow(mean, vmax=limit * 1.1, **{"vmin": 0, **colours})
            for (y, x), value in np.ndenumerate(mean):
                dark = abs(value) > 0.6 * limit
                label = f"{value:+.1f}" if difference else f"{value:.1f}"
                if spread is not None:
                    label += f"\n\u00b1{spread[y, x]:.1f}"
                axis.text(x, y, label, ha="center", va="center", color="w" if dark else "k")
            names = [MODALITY_NAMES[modality] for modality in MODALITIES]
            axis.set_xticks(range(3), names)
            axis.set_yticks(range(3), names if axis is axes[row, 0] else [""] * 3)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(f"{name}, {pool_name}", fontweight="bold")
        axes[row, 0].set_ylabel("query")
    for axis in axes[1]:
        axis.set_xlabel("candidate")
    figure.suptitle(f"{title}: hit@5 in % on held-out concepts")
    save(figure, path)


def principal_plane(embeddings: Embeddings) -> tuple[np.ndarray, float]:
    """Project all modalities on their common first two principal components.

    Returns
    -------
    tuple
        ``(3, concepts, 2)`` and the share of the variance that the plane keeps.
    """
    stacked = np.stack([embeddings[modality].cpu().numpy() for modality in MODALITIES])
    flat = stacked.reshape(-1, stacked.shape[-1]).astype(np.float64)
    flat -= flat.mean(0)
    _, singular, directions = np.linalg.svd(flat, full_matrices=False)
    kept = float((singular[:2] ** 2).sum() / (singular**2).sum())
    return (flat @ directions[:2].T).reshape(3, -1, 2), kept


def modality_gap(embeddings: Embeddings) -> float:
    """Return the distance between the mean image and the mean text embedding."""
    return float((embeddings["i"].mean(0) - embeddings["t"].mean(0)).norm())


def gap_axis(embeddings: Embeddings) -> np.ndarray:
    """Project all modalities on the line through the mean image and the mean text: ``(3, N)``.

    The origin is halfway between the two.
    """
    means = embeddings["i"].mean(0), embeddings["t"].mean(0)
    direction = (means[1] - means[0]) / (means[1] - means[0]).norm()
    middle = (means[0] + means[1]) / 2
    return np.stack([((embeddings[m] - middle) @ direction).cpu().numpy() for m in MODALITIES])


def pca(panels: dict[str, Embeddings], path: Path) -> None:
    """Draw where the three modalities lie, one column per model.

    The upper row is the plane of the first two principal components; the lower row looks along the
    axis of the gap, which that plane need not contain.
    """
    figure, axes = plt.subplots(2, len(panels), figsize=(10, 6), height_ratios=(3, 1.3))
    bins = np.linspace(-1, 1, 61)
    for column, (title, embeddings) in enumerate(panels.items()):
        plane, line = axes[:, column]
        points, kept = principal_plane(embeddings)
        shares = zip(MODALITIES, points, gap_axis(embeddings), strict=True)
        for modality, cloud, positions in shares:
            colour, name = MODALITY_COLOURS[modality], MODALITY_NAMES[modality]
            plane.scatter(*cloud.T, s=9, color=colour, alpha=0.45, linewidths=0)
            plane.scatter(*cloud.mean(0), s=150, color=colour, edgecolors="k", zorder=3, label=name)
            line.hist(positions, bins, density=True, color=colour, alpha=0.55)
        plane.set_title(title, fontweight="bold")
        plane.set_xlabel(f"two principal components ({kept:.0%})")
        plane.set_aspect("equal", adjustable="datalim")
        line.set_xlabel(f"along the gap: {modality_gap(embeddings):.2f} from image to text")
        for axis in (plane, line):
            axis.set_xticks([])
            axis.set_yticks([])
        line.spines["left"].set_visible(False)
        line.set_ylim(0, 6)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Where images, texts and fused embeddings of the held-out concepts lie")
    save(figure, path)


def similarity_histograms(
    panels: Mapping[str, Sequence[tuple[Embeddings, Embeddings]]], path: Path
) -> None:
    """Compare a query's similarity to the right item of another modality with the distractors'.

    Parameters
    ----------
    panels
        For each model the pairs of query side and candidate side.
    path
        Where the figure goes.
    """
    tasks = (("i", "t"), ("t", "i"), ("it", "i"))
    bins = np.linspace(-0.7, 1.0, 35)
    shape = (len(panels), len(tasks))
    figure, axes = plt.subplots(*shape, figsize=(9.6, 5.4), sharex=True, sharey=True)
    for row, (model, sides) in zip(axes, panels.items(), strict=True):
        for axis, (query, target) in zip(row, tasks, strict=True):
            right = np.stack([(a[query] @ b[target].T).cpu().numpy() for a, b in sides])
            own = np.stack([(a[query] @ b[query].T).cpu().numpy() for a, b in sides])
            others: np.ndarray = ~np.eye(right.shape[1], dtype=bool)
            clouds = [
                ("wrong concept, query's own modality", own[:, others], "#9e9e9e"),
                ("wrong concept, right modality", right[:, others], "#90caf9"),
                ("right answer", right.diagonal(axis1=1, axis2=2), "#c2185b"),
            ]
            for name, values, colour in clouds:
                style = {"histtype": "step", "linewidth": 2.2}
                if name != "right answer":
                    style = {"histtype": "stepfilled", "alpha": 0.65}
                axis.hist(values.ravel(), bins, density=True, color=colour, label=name, **style)
            axis.set_title(
                f"{model}: {MODALITY_NAMES[query]} \u2192 {MODALITY_NAMES[target]}",
                fontweight="bold",
            )
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("cosine similarity")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Wrong answers: grey and blue coincide where there is no modality gap")
    save(figure, path)


def training_curves(histories: Mapping[str, Sequence[History]], path: Path) -> None:
    """Draw training loss and validation recall over the steps, every seed and the mean."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for loss, runs in histories.items():
        colour = LOSS_COLOURS[loss]
        window = max(1, len(runs[0].loss) // 40)
        kernel = np.ones(window) / window
        for run in runs:
            smooth = np.convolve(run.loss, kernel, mode="valid")
            left.plot(np.arange(len(smooth)) + window, smooth, color=colour, alpha=0.8)
            right.plot(run.validation_step, run.validation, color=colour, alpha=0.35)
        mean = np.mean([run.validation for run in runs], axis=0)
        right.plot(runs[0].validation_step, mean, color=colour, linewidth=2.5, marker="o")
    left.set(title="training loss (two different sums)", xlabel="step", ylim=(0, None))
    right.set(title="validation: hit@5, union pool, mean of 9", xlabel="step", ylim=(0, None))
    right.set_ylabel("%")
    colours = [Line2D([], [], color=colour, label=name) for name, colour in LOSS_COLOURS.items()]
    seeds = len(next(iter(histories.values())))
    mean_line = Line2D([], [], color="k", linewidth=2.5, marker="o", label=f"mean of {seeds}")
    seed_line = Line2D([], [], color="k", alpha=0.35, label="one seed")
    left.legend(handles=colours, loc="upper right", frameon=False)
    right.legend(handles=[*colours, mean_line, seed_line], loc="lower right", frameon=False)
    save(figure, path)
