"""The whole demo: data, training runs, evaluation, tables and figures."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gcl_kernels.retrieval import RetrievalDataset

from . import figures, report
from .baselines import baseline_hits
from .data import EmojiData, load_data
from .drawings import DEFAULT_CACHE
from .evaluate import Embeddings, load_tasks, nine_tasks, paired_sides
from .export import export
from .systems import SYSTEMS, System
from .train import LOSSES, History, begin, loss_share, train

FULL_SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
QUICK_SHARE = 0.3
"""Of a system's steps."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    systems: dict[str, System]
    seeds: Sequence[int]
    device: str
    out: Path
    cache: Path


@dataclass(frozen=True)
class Held:
    """Held-out concepts and their retrieval tasks."""

    data: EmojiData
    validation: list[RetrievalDataset]
    test: list[RetrievalDataset]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.emoji_retrieval",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--systems", nargs="+", choices=[*SYSTEMS, "all"], default=["clip_sf"])
    add("--quick", action="store_true", help="one seed and fewer steps, unless given otherwise")
    add("--seeds", type=int, nargs="+", help=f"default {FULL_SEEDS}, quick {QUICK_SEEDS}")
    add("--steps", type=int, help="steps of a run; default: the system's, with --quick fewer")
    add("--batch-size", type=int, help="pairs in a batch; default: the system's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--out", type=Path, default=Path("runs/emoji_retrieval"), help="folder of the results")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the drawings")
    given = parser.parse_args(arguments)
    for name, value in (("--steps", given.steps), ("--batch-size", given.batch_size)):
        if value is not None and value < 1:
            parser.error(f"{name} must be at least 1, got {value}")
    names = list(SYSTEMS) if "all" in given.systems else given.systems

    def changed(system: System) -> System:
        steps = given.steps or int(QUICK_SHARE * system.steps if given.quick else system.steps)
        return replace(
            system,
            steps=steps,
            alignment_steps=system.alignment_steps * steps // system.steps,
            batch_size=given.batch_size or system.batch_size,
        )

    return Options(
        systems={name: changed(SYSTEMS[name]) for name in names},
        seeds=given.seeds or (QUICK_SEEDS if given.quick else FULL_SEEDS),
        device=given.device,
        out=given.out,
        cache=given.cache,
    )


def describe(data: EmojiData) -> dict[str, int]:
    """Count what there is."""
    return {
        "concepts": len(data.concepts),
        "groups": int(data.split.group.max()) + 1,
        "training groups": len(data.split.train),
        "training concepts": int((data.split.part == "train").sum()),
        "validation concepts": len(data.split.val),
        "test concepts": len(data.split.test),
    }


def prepare(data: EmojiData, root: Path) -> Held:
    """Write the held-out concepts as trees under `root`, and read their tasks."""
    for part, indices in (("val", data.split.val), ("test", data.split.test)):
        export(data, indices, root / part)
    return Held(data, load_tasks(root / "val", ["union"]), load_tasks(root / "test"))


def stacked(runs: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Seeds first."""
    return {name: np.stack([one[name] for one in runs]) for name in runs[0]}


def run_system(
    system: System, options: Options, held: Held, out: Path
) -> tuple[report.Hits, dict[str, Any]]:
    """Every run of a system; figures, tables and models go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    data, first = held.data, options.seeds[0]
    tested: dict[str, list[dict[str, np.ndarray]]] = {model: [] for model in report.MODELS}
    other_fusion: dict[str, list[dict[str, np.ndarray]]] = {loss: [] for loss in LOSSES}
    histories: dict[str, list[History]] = {loss: [] for loss in LOSSES}
    sides: dict[str, list[tuple[Embeddings, Embeddings]]] = {}
    usual, other = system.fusions
    for seed in options.seeds:
        start = begin(system, seed, data, options.device)
        tested["before"].append(nine_tasks(start.encoder(usual), held.test))
        if seed == first:
            sides["before"] = paired_sides(start.encoder(usual), data, data.split.test)
        for loss in LOSSES:
            model, history = train(system, loss, seed, start, data, held.validation)
            histories[loss].append(history)
            encoder = model.encoder(usual)
            tested[loss].append(nine_tasks(encoder, held.test))
            if seed == first:
                other_fusion[loss].append(nine_tasks(model.encoder(other), held.test))
                sides[loss] = paired_sides(encoder, data, data.split.test)
    seconds = time.perf_counter() - started

    hits = {model: stacked(runs) for model, runs in tested.items()}
    other_hits = {loss: stacked(runs) for loss, runs in other_fusion.items()}
    panels = {
        "before training": sides["before"][0][0],
        **{f"after {loss}": sides[loss][0][0] for loss in LOSSES},
    }
    figures.heat_maps(system.title, hits, out / "heatmaps.png")
    figures.pca(panels, out / "pca.png")
    figures.similarity_histograms({loss: sides[loss] for loss in LOSSES}, out / "similarity.png")
    figures.training_curves(histories, out / "curves.png")
    baselines = baseline_hits(data, data.split.test, held.test)
    (out / "tables.md").write_text(report.all_tables(hits, other_hits, baselines), encoding="utf-8")
    shares = {loss: loss_share(system, loss, start, data) for loss in LOSSES}
    for loss, share in shares.items():
        print(
            f"{loss}: {1e3 * share['loss_seconds']:.1f} ms of a step's "
            f"{1e3 * share['step_seconds']:.0f} ms ({share['share']:.1%}) is the loss"
        )
    return hits, {
        "steps": system.steps,
        "batch size": system.batch_size,
        "initial temperature": system.temperature,
        "learning rates": dict(system.rates),
        "fusion": {"usual": usual, "other": other},
        "hits": report.hit_summary(hits),
        "hits with the other fusion": report.hit_summary(other_hits),
        "baselines": {name: values.round(3).tolist() for name, values in baselines.items()},
        "modality gap": {name: figures.modality_gap(panel) for name, panel in panels.items()},
        "histories": {loss: [asdict(one) for one in runs] for loss, runs in histories.items()},
        "loss share of a step": shares,
        "seconds": seconds,
    }


def run(options: Options) -> dict[str, Any]:
    """Run everything, write the results and return what ``results.json`` holds."""
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(options.cache)
    counts = describe(data)
    print(", ".join(f"{number} {name}" for name, number in counts.items()), flush=True)
    held = prepare(data, options.out / "trees")
    results: dict[str, Any] = {
        "seeds": list(options.seeds),
        "versions": report.versions(options.device),
        "data": counts,
        "systems": {},
    }
    hits: dict[str, report.Hits] = {}
    for name, system in options.systems.items():
        hits[system.title], results["systems"][name] = run_system(
            system, options, held, options.out / name
        )
        # After every system: an interrupted run keeps what it has.
        results["seconds"] = time.perf_counter() - started
        text = json.dumps(results, indent=1)
        (options.out / "results.json").write_text(text, encoding="utf-8")
        table = report.systems_table(hits)
        (options.out / "systems.md").write_text(f"{table}\n", encoding="utf-8")
    print(f"\n{table}\ntotal {results['seconds']:.0f} s; tables and figures in {options.out}")
    return results


def run_from_command_line(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    run(parse(arguments))
