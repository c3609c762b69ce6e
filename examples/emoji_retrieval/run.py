"""The whole demo: data, training runs, evaluation, tables and figures."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from . import figures, report
from .baselines import baseline_recalls
from .data import EmojiData, load_data
from .drawings import DEFAULT_CACHE
from .evaluate import Embeddings, embed_all_views, embed_raw, evaluate, modalities, paired_sides
from .model import create_model, create_tokenizer
from .train import LOSSES, History, TrainConfig, loss_share, train

FULL_STEPS, FULL_SEEDS = 400, (0, 1, 2)
QUICK_STEPS, QUICK_SEEDS = 120, (0,)
# The best of the search on validation concepts (tune.py, docs/demo.md), for either loss.
LEARNING_RATE = 2e-3
# Whose time is reported: the loss, and whether it fuses (score fusion) or is given fused_features.
TIMED = {
    "CL": ("CL", False),
    "GCL, score fusion": ("GCL", True),
    "GCL, fused_features given": ("GCL", False),
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    seeds: Sequence[int]
    train: dict[str, TrainConfig]
    device: str
    out: Path
    cache: Path


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.emoji_retrieval",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed and fewer steps, unless given otherwise")
    add("--seeds", type=int, nargs="+", help=f"default {FULL_SEEDS}, quick {QUICK_SEEDS}")
    add("--steps", type=int, help=f"steps of a run; default {FULL_STEPS}, quick {QUICK_STEPS}")
    add("--batch-size", type=int, default=128, help="pairs in a batch")
    add("--learning-rate", type=float, help=f"peak, for both losses; default {LEARNING_RATE}")
    add("--temperature", type=float, default=0.07, help="initial temperature")
    add("--fixed-temperature", action="store_true", help="do not train the temperature")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--out", type=Path, default=Path("runs/emoji_retrieval"), help="folder of the results")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the drawings")
    given = parser.parse_args(arguments)
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if given.temperature <= 0:
        parser.error(f"--temperature must be positive, got {given.temperature}")
    return Options(
        seeds=given.seeds or (QUICK_SEEDS if given.quick else FULL_SEEDS),
        train={
            loss: TrainConfig(
                steps=given.steps or (QUICK_STEPS if given.quick else FULL_STEPS),
                batch_size=given.batch_size,
                learning_rate=given.learning_rate or LEARNING_RATE,
                temperature=given.temperature,
                learn_temperature=not given.fixed_temperature,
                device=given.device,
            )
            for loss in LOSSES
        },
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


def run(options: Options) -> dict:
    """Run everything, write the results and return what ``results.json`` holds."""
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    data, tokenizer = load_data(options.cache), create_tokenizer()
    counts = describe(data)
    print(", ".join(f"{number} {name}" for name, number in counts.items()), flush=True)
    baselines = baseline_recalls(data, data.split.test)
    prepared = time.perf_counter()

    tested: dict[str, list[dict[str, np.ndarray]]] = {loss: [] for loss in LOSSES}
    unit_fusion: dict[str, list[dict[str, np.ndarray]]] = {loss: [] for loss in LOSSES}
    histories: dict[str, list[History]] = {loss: [] for loss in LOSSES}
    sides: dict[str, list[tuple[Embeddings, Embeddings]]] = {}
    for seed in options.seeds:
        for loss in LOSSES:
            model, history = train(loss, seed, options.train[loss], data, tokenizer)
            histories[loss].append(history)
            test = data.split.test
            tested[loss].append(evaluate(model, data, test, tokenizer))
            unit_fusion[loss].append(evaluate(model, data, test, tokenizer, unit_fusion=True))
            if seed == options.seeds[0]:
                sides[loss] = paired_sides(embed_all_views(model, data, test, tokenizer))
    trained = time.perf_counter()

    recalls, unit_recalls = (
        {
            loss: {name: np.stack([one[name] for one in runs]) for name in runs[0]}
            for loss, runs in results_of.items()
        }
        for results_of in (tested, unit_fusion)
    )
    temperature = options.train[LOSSES[0]].temperature
    start = create_model(options.seeds[0], temperature).to(options.device)
    before = modalities(*embed_raw(start, data, data.split.test, 0, "name", tokenizer))
    panels = {"before training": before, **{f"after {loss}": sides[loss][0][0] for loss in LOSSES}}
    figures.heat_maps(recalls, options.out / "demo_heatmaps.png")
    figures.pca(panels, options.out / "demo_pca.png")
    figures.similarity_histograms(sides, options.out / "demo_similarity.png")
    figures.training_curves(histories, options.out / "demo_curves.png")

    tables = report.all_tables(recalls, unit_recalls, baselines)
    (options.out / "tables.md").write_text(tables, encoding="utf-8")
    print(f"\n{tables}")
    shares = {
        name: loss_share(loss, fuse_in_loss, options.train[loss], data, tokenizer)
        for name, (loss, fuse_in_loss) in TIMED.items()
    }
    for name, share in shares.items():
        print(
            f"{name}: {1e3 * share['loss_seconds']:.1f} ms of a step's "
            f"{1e3 * share['step_seconds']:.0f} ms ({share['share']:.1%}) is the loss"
        )
    total = time.perf_counter() - started
    results = {
        "config": {loss: asdict(config) for loss, config in options.train.items()},
        "seeds": list(options.seeds),
        "versions": report.versions(options.device),
        "data": counts,
        "recall": report.recall_summary(recalls),
        "recall with fusion of unit embeddings": report.recall_summary(unit_recalls),
        "baselines": {name: values.round(3).tolist() for name, values in baselines.items()},
        "modality gap": {name: figures.modality_gap(panel) for name, panel in panels.items()},
        "histories": {loss: [asdict(one) for one in runs] for loss, runs in histories.items()},
        "loss share of a step": shares,
        "seconds": {
            "data": prepared - started,
            "training and evaluation": trained - prepared,
            "total": total,
        },
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"total {total:.0f} s; tables and figures in {options.out}")
    return results


def run_from_command_line(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    run(parse(arguments))
