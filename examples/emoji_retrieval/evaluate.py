"""The nine retrieval tasks, query in {i, t, it} x candidate in {i, t, it}, on held-out concepts.

A query and its candidates never share a drawing style or a text: the query side has one style and
one text, the candidate side the other style and the other text, and all four assignments are
averaged. So no query is among its candidates, and i->i asks for the other artist's drawing, t->t
for the other text, it->t for the other text of what the query shows and says, and so on.

Pools (of N concepts):

- ``local``: the N candidates of the target modality.
- ``global``: all 3 N, of every modality. As in M-BEIR only the labelled positive, the item of the
  target modality, counts: everything else, the same concept in another modality too, is a
  distractor.
- ``global_distinct``: as ``global``, without the query concept's items of the other modalities,
  which answer the query in the wrong form and are arguably no errors.

There is one positive per query, so Recall@k is M-BEIR's hit rate. ``any_modality`` is the hit rate
where the concept may come in any form.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gcl_kernels.integrations.open_clip import FusedCLIP

from .data import TEXTS, EmojiData, Tokenizer, held_out_view

MODALITIES = ("i", "t", "it")
CUTOFFS = (1, 5, 10)
POOLS = ("local", "global", "global_distinct")

Embeddings = dict[str, Tensor]


def ranks(similarity: Tensor, positive: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Rank the positive of every query among its candidates; a tie counts against it.

    Parameters
    ----------
    similarity
        ``(queries, candidates)``.
    positive
        ``(queries,)`` index of the right candidate.
    excluded
        ``(queries, candidates)`` booleans: true where a candidate is not in the query's pool.

    Returns
    -------
    Tensor
        ``(queries,)`` ranks from 1.
    """
    if not torch.isfinite(similarity).all():
        raise ValueError("similarities must be finite: a NaN would rank first")
    score = similarity.gather(1, positive[:, None])
    ahead = similarity >= score
    if excluded is not None:
        if excluded.gather(1, positive[:, None]).any():
            raise ValueError("a query's positive must be in its pool")
        ahead &= ~excluded
    return ahead.sum(1)


def recall(rank: Tensor) -> np.ndarray:
    """Return the percentage of ranks within each of ``CUTOFFS``."""
    return np.array([100 * (rank <= k).double().mean().item() for k in CUTOFFS])


def task_recalls(queries: Embeddings, candidates: Embeddings) -> dict[str, np.ndarray]:
    """Recall@k of the nine tasks; row j of every tensor is concept j.

    Returns
    -------
    dict
        For each of ``POOLS``, ``(3 query modalities, 3 candidate modalities, cutoffs)``; and
        ``any_modality``, ``(3 query modalities, cutoffs)``.
    """
    count = len(queries["i"])
    own = torch.arange(count)
    pool = torch.cat([candidates[modality] for modality in MODALITIES])
    result = {name: np.zeros((3, 3, len(CUTOFFS))) for name in POOLS}
    result["any_modality"] = np.zeros((3, len(CUTOFFS)))
    for row, query in enumerate(MODALITIES):
        similarity = (queries[query] @ pool.T).cpu()
        in_pool = []
        for column in range(len(MODALITIES)):
            positive = own + column * count
            local = similarity[:, column * count : (column + 1) * count]
            other_forms = torch.zeros_like(similarity, dtype=torch.bool)
            for other in range(len(MODALITIES)):
                other_forms[own, own + other * count] = other != column
            in_pool.append(ranks(similarity, positive))
            result["local"][row, column] = recall(ranks(local, own))
            result["global"][row, column] = recall(in_pool[-1])
            result["global_distinct"][row, column] = recall(
                ranks(similarity, positive, other_forms)
            )
        result["any_modality"][row] = recall(torch.stack(in_pool).amin(0))
    return result


@torch.no_grad()
def embed_raw(
    model: FusedCLIP,
    data: EmojiData,
    indices: np.ndarray,
    style: int,
    text: str,
    tokenizer: Tokenizer,
) -> tuple[Tensor, Tensor]:
    """Embed one view of the concepts: images and texts, not normalised."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    images, tokens = held_out_view(data, indices, style, text, tokenizer)
    embeddings = model.encode_image(images.to(device)), model.encode_text(tokens.to(device))
    model.train(was_training)
    return embeddings


def modalities(image: Tensor, text: Tensor, unit_fusion: bool = False) -> Embeddings:
    """Normalise image, text and their sum (CLIP-SF: of the raw embeddings, else of unit ones)."""
    unit_image, unit_text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    total = unit_image + unit_text if unit_fusion else image + text
    return {"i": unit_image, "t": unit_text, "it": F.normalize(total, dim=-1)}


def paired_sides(
    raw: dict[tuple[int, str], tuple[Tensor, Tensor]], unit_fusion: bool = False
) -> list[tuple[Embeddings, Embeddings]]:
    """Pair every view (style, text) with the view of the other style and the other text."""
    views = {view: modalities(image, text, unit_fusion) for view, (image, text) in raw.items()}
    return [
        (queries, views[1 - style, TEXTS[1 - TEXTS.index(text)]])
        for (style, text), queries in views.items()
    ]


def embed_all_views(
    model: FusedCLIP, data: EmojiData, indices: np.ndarray, tokenizer: Tokenizer
) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Call :func:`embed_raw` for both styles and both texts."""
    return {
        (style, text): embed_raw(model, data, indices, style, text, tokenizer)
        for style in (0, 1)
        for text in TEXTS
    }


def evaluate(
    model: FusedCLIP,
    data: EmojiData,
    indices: np.ndarray,
    tokenizer: Tokenizer,
    unit_fusion: bool = False,
) -> dict[str, np.ndarray]:
    """Average :func:`task_recalls` over the four assignments of styles and texts to sides.

    ``lengths`` is added: the mean length of the raw image and text embeddings, which decides how
    much of a fused embedding is image and how much is text.
    """
    raw = embed_all_views(model, data, indices, tokenizer)
    runs = [task_recalls(*sides) for sides in paired_sides(raw, unit_fusion)]
    result = {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}
    lengths = [[e.norm(dim=1).mean().item() for e in pair] for pair in raw.values()]
    result["lengths"] = np.mean(lengths, axis=0)
    return result
