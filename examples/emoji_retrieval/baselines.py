"""What comes without learning: how far shared words, shared letters or raw pixels go.

They say whether a task is a real question. They use the same test concepts, sides and candidates
as the models do, in the local pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import EmojiData, full_text
from .evaluate import ranks, recall
from .inventory import words


def trigrams(text: str) -> list[str]:
    """Letter trigrams of the padded words: *cat* gives ``_ca cat at_``."""
    padded = [f"_{word}_" for word in words(text)]
    return [word[i : i + 3] for word in padded for i in range(len(word) - 2)]


def count_vectors(texts: list[str], split: Callable[[str], list[str]]) -> Tensor:
    """Return L2-normalised tf-idf vectors of the pieces that ``split`` makes."""
    counts = [Counter(split(text)) for text in texts]
    column = {piece: number for number, piece in enumerate(sorted(set().union(*counts)))}
    vectors = torch.zeros(len(texts), len(column), dtype=torch.float64)
    for row, count in enumerate(counts):
        for piece, times in count.items():
            vectors[row, column[piece]] = times
    documents = (vectors > 0).sum(0)
    return F.normalize(vectors * torch.log(len(texts) / documents), dim=1)


def baseline_recalls(data: EmojiData, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Recall@k of t->t by words and by letters, and of i->i by pixels, both directions averaged."""
    count = len(indices)
    texts = [full_text(data.concepts[i], t) for t in ("name", "keywords") for i in indices]
    images = data.images[torch.from_numpy(indices)]
    pixels = F.normalize((images - images.mean((0, 1))).flatten(2).double(), dim=2)
    sides = {
        "t->t, shared words": count_vectors(texts, words).view(2, count, -1),
        "t->t, shared letter trigrams": count_vectors(texts, trigrams).view(2, count, -1),
        "i->i, pixels": pixels.transpose(0, 1),
    }
    own = torch.arange(count)
    return {
        name: (recall(ranks(a @ b.T, own)) + recall(ranks(b @ a.T, own))) / 2
        for name, (a, b) in sides.items()
    }
