"""The tuning behind the learning rates: the same search for each loss, on validation concepts.

``python -m examples.emoji_retrieval.tune --systems clip_sf`` walks, for each loss, from one
learning rate of ``RATES`` to the better neighbour until both are worse. A cell is one run of seed
100, which the recorded run does not use; its score is the mean of the nine tasks' reported figures,
hit@5 in the local pool and hit@50 in the union pool. The test concepts are not looked at.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from gcl_kernels.retrieval.report import markdown_table

from .data import EmojiData, load_data
from .drawings import DEFAULT_CACHE
from .evaluate import CUTOFFS, load_tasks, nine_tasks
from .export import export
from .systems import SYSTEMS, System
from .train import LOSSES, begin, train

SEED = 100
RATES = (1.5e-5, 3e-5, 6e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def search(system: System, data: EmojiData, given: argparse.Namespace) -> list[dict[str, object]]:
    """Every cell that was run."""
    tasks = load_tasks(given.out / "trees", ["local", "union"])
    start = begin(system, SEED, data, given.device)
    rows: list[dict[str, object]] = []

    def score(loss: str, rate: float) -> float:
        tried = replace(system, rates={loss: rate})
        model, history = train(tried, loss, SEED, start, data, [])
        found = nine_tasks(model.encoder(system.fusions[0]), tasks)
        local, mixed = (
            float(found[pool][..., CUTOFFS.index(k)].mean())
            for pool, k in (("local", 5), ("union", 50))
        )
        rows.append(
            {
                "system": system.title,
                "loss": loss,
                "learning rate": rate,
                "final temperature": round(history.temperature, 4),
                "local hit@5": round(local, 2),
                "union hit@50": round(mixed, 2),
                "score": round((local + mixed) / 2, 2),
            }
        )
        print(rows[-1], flush=True)
        return (local + mixed) / 2

    for loss in LOSSES:
        scores: dict[int, float] = {}
        best = min(range(len(RATES)), key=lambda n: abs(RATES[n] - system.rates[loss]))
        to_try = [best]
        while to_try:
            for cell in to_try:
                scores[cell] = score(loss, RATES[cell])
            best = max(scores, key=lambda cell: scores[cell])
            neighbours = {best - 1, best + 1} & set(range(len(RATES)))
            to_try = sorted(neighbours - scores.keys())
    return rows


def main() -> None:
    """Search for each system and loss, and print every cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji_tuning"))
    given = parser.parse_args()
    data = load_data(given.cache)
    export(data, data.split.val, given.out / "trees")
    rows: list[dict[str, object]] = []
    for name in given.systems:
        rows += search(SYSTEMS[name], data, given)
        (given.out / "tuning.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
