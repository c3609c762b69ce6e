"""What comes without learning: how far shared words, shared letters or raw pixels go.

They say whether a task is a real question. They are encoders like the models, on the same trees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from gcl_kernels.retrieval import Encoder, RetrievalDataset, evaluate

from .data import TEXTS, EmojiData, full_text
from .evaluate import CUTOFFS
from .inventory import words
from .systems import to_tensor


def trigrams(text: str) -> list[str]:
    """Letter trigrams of the padded words: *cat* gives ``_ca cat at_``."""
    padded = [f"_{word}_" for word in words(text)]
    return [word[i : i + 3] for word in padded for i in range(len(word) - 2)]


def counting_encoder(corpus: Sequence[str], split: Callable[[str], list[str]]) -> Encoder:
    """tf-idf vectors of the pieces that ``split`` makes of a text."""
    counts = [Counter(split(text)) for text in corpus]
    column = {piece: number for number, piece in enumerate(sorted(set().union(*counts)))}
    documents = torch.zeros(len(column), dtype=torch.float64)
    for count in counts:
        documents[[column[piece] for piece in count]] += 1
    weights = torch.log(len(corpus) / documents)

    def encode(items: list[dict[str, Any]]) -> Tensor:
        vectors = torch.zeros(len(items), len(column), dtype=torch.float64)
        for row, item in enumerate(items):
            for piece, times in Counter(split(item["text"])).items():
                vectors[row, column[piece]] = times
        return vectors * weights

    return encode


def pixel_encoder(mean: Tensor) -> Encoder:
    """Pixels less those of the mean drawing, ``(3, H, W)``, at half the size."""
    return lambda items: torch.stack(
        [avg_pool2d(to_tensor(item["image"]) - mean, 2).flatten() for item in items]
    )


def baseline_hits(
    data: EmojiData, indices: np.ndarray, tasks: Sequence[RetrievalDataset]
) -> dict[str, np.ndarray]:
    """hit@k in % of t->t by words and by letters, and of i->i by pixels; means over the sides."""
    texts = [full_text(data.concepts[i], t) for t in TEXTS for i in indices]
    mean = data.images[torch.from_numpy(indices)].mean((0, 1))
    encoders = {
        "t->t, shared words": counting_encoder(texts, words),
        "t->t, shared letter trigrams": counting_encoder(texts, trigrams),
        "i->i, pixels": pixel_encoder(mean),
    }
    hits = {}
    for name, encoder in encoders.items():
        own = [task for task in tasks if task.pool == "local" and name.startswith(task.task)]
        results = evaluate(encoder, own, CUTOFFS, progress=False)
        hits[name] = np.mean([[100 * r[f"hit@{k}"] for k in CUTOFFS] for r in results], axis=0)
    return hits
