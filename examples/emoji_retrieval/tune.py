"""The tuning behind the defaults: the same search for both losses, on the validation concepts.

``python -m examples.emoji_retrieval.tune --out runs/emoji_tuning`` walks, for each loss, from one
learning rate of ``LEARNING_RATES`` to the better neighbour until both neighbours are worse, and
tries the other initial temperature there. A cell is one run of seed 100, which the recorded run
does not use; its score is the mean Recall@5 of the nine tasks over the local and the global pool.
The test concepts are not looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .data import load_data
from .drawings import DEFAULT_CACHE
from .evaluate import evaluate
from .model import create_tokenizer
from .report import markdown_table
from .run import FULL_STEPS
from .train import LOSSES, VALIDATION_CUTOFF, TrainConfig, train

SEED = 100
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FIRST_LEARNING_RATE = LEARNING_RATES.index(1e-3)
TEMPERATURES = (0.07, 0.03)


def main() -> None:
    """Search for each loss and print every cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=FULL_STEPS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji_tuning"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    data, tokenizer = load_data(given.cache), create_tokenizer()
    rows: list[dict[str, object]] = []

    def score(loss: str, learning_rate: float, temperature: float) -> float:
        config = TrainConfig(
            given.steps,
            given.batch_size,
            learning_rate,
            temperature,
            learn_temperature=True,
            device=given.device,
            validations=1,
        )
        model, history = train(loss, SEED, config, data, tokenizer)
        found = evaluate(model, data, data.split.val, tokenizer)
        local, mixed = (
            float(found[pool][..., VALIDATION_CUTOFF].mean()) for pool in ("local", "global")
        )
        rows.append(
            {
                "loss": loss,
                "learning rate": learning_rate,
                "initial temperature": temperature,
                "final temperature": round(history.temperature, 4),
                "local": round(local, 2),
                "global": round(mixed, 2),
                "score": round((local + mixed) / 2, 2),
            }
        )
        # After every cell: an interrupted search keeps what it has.
        (given.out / "tuning.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return (local + mixed) / 2

    for loss in LOSSES:
        scores: dict[int, float] = {}
        best, to_try = FIRST_LEARNING_RATE, [FIRST_LEARNING_RATE]
        while to_try:
            for cell in to_try:
                scores[cell] = score(loss, LEARNING_RATES[cell], TEMPERATURES[0])
            best = max(scores, key=lambda cell: scores[cell])
            neighbours = {best - 1, best + 1} & set(range(len(LEARNING_RATES)))
            to_try = sorted(neighbours - scores.keys())
        for temperature in TEMPERATURES[1:]:
            score(loss, LEARNING_RATES[best], temperature)
    print(markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
