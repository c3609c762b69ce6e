"""The nine retrieval tasks, query in {i, t, it} x candidate in {i, t, it}, on held-out concepts.

The trees of export.py, searched by `gcl_kernels.retrieval`, and means over the four sides. Pools
(of N concepts):

- ``local``: the N candidates of the target modality.
- ``union``: all 3 N, of every modality. As in M-BEIR only the labelled positive, the item of the
  target modality, counts: everything else, the same concept in another modality too, is a
  distractor.
- ``union_distinct``: as ``union``, without the query concept's items of the other modalities,
  which answer the query in the wrong form and are arguably no errors.
- ``any_form``: ``union``, where the concept is a hit in whatever form.

There is one positive per query (but in ``any_form``), so hit@k is recall@k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gcl_kernels.retrieval import Encoder, RetrievalDataset, evaluate, load_mbeir
from gcl_kernels.retrieval.datasets import MODALITIES
from gcl_kernels.retrieval.encode import unit_embeddings
from gcl_kernels.retrieval.mbeir import TASKS

from .data import STYLES, EmojiData, full_text
from .export import SIDES, Side, candidate_id, drawing, other_side

CUTOFFS = (1, 5, 50)
"""M-BEIR's figure is hit@5 in a local pool, and the paper's hit@50 in the union pool."""
POOLS = ("local", "union", "union_distinct")

Embeddings = dict[str, Tensor]
"""``(N, D)`` unit embeddings by modality, row j of concept j."""


def load_tasks(root: Path, pools: Sequence[str] = (*POOLS, "any_form")) -> list[RetrievalDataset]:
    """Every side's tasks in these pools; in ``any_form`` one for each modality of the query."""
    tasks = []
    for side in SIDES:
        tree = root / "mbeir" / "-".join(side)
        for task in TASKS:
            if "local" in pools:
                tasks.append(load_mbeir(tree, f"emoji_task{task}", "local"))
            if not {*pools} - {"local"}:
                continue
            union = load_mbeir(tree, f"emoji_task{task}", "union")
            forms = {
                qid: [candidate_id(number, modality) for modality in MODALITIES]
                for number, qid in enumerate(union.queries.ids)
            }
            others = {
                qid: [did for did in dids if did not in union.qrels[qid]]
                for qid, dids in forms.items()
            }
            kinds = {
                "union": union,
                "union_distinct": replace(union, pool="union_distinct", exclude=others),
            }
            if union.task.endswith("->i"):
                any_form = {qid: dict.fromkeys(dids, 1) for qid, dids in forms.items()}
                kinds["any_form"] = replace(union, pool="any_form", qrels=any_form)
            tasks += [dataset for pool, dataset in kinds.items() if pool in pools]
    return tasks


def nine_tasks(encoder: Encoder, tasks: Sequence[RetrievalDataset]) -> dict[str, np.ndarray]:
    """hit@k in % by pool, means over the sides.

    Returns
    -------
    dict
        For each of ``POOLS`` that was loaded, ``(3 query modalities, 3 candidate modalities,
        cutoffs)``; for ``any_form``, ``(3 query modalities, cutoffs)``.
    """
    found: dict[tuple[str, str], list[list[float]]] = {}
    for result in evaluate(encoder, tasks, CUTOFFS, batch_size=256, progress=False):
        hits = [100 * result[f"hit@{k}"] for k in CUTOFFS]
        found.setdefault((result.pool, result.task), []).append(hits)
    means = {key: np.mean(values, axis=0) for key, values in found.items()}
    table = {
        pool: np.stack(
            [
                np.stack([means[pool, f"{query}->{candidate}"] for candidate in MODALITIES])
                for query in MODALITIES
            ]
        )
        for pool in POOLS
        if (pool, "i->i") in means
    }
    if ("any_form", "i->i") in means:
        table["any_form"] = np.stack([means["any_form", f"{query}->i"] for query in MODALITIES])
    return table


@torch.inference_mode()
def embed_side(encoder: Encoder, data: EmojiData, indices: np.ndarray, side: Side) -> Embeddings:
    """What the figures show: one style and one text of every concept, and both together."""
    style, text = STYLES.index(side[0]), side[1]
    items = [(full_text(data.concepts[i], text), drawing(data, i, style)) for i in indices]
    return {
        modality: unit_embeddings(
            encoder,
            [
                {
                    "text": text if "t" in modality else None,
                    "image": image if "i" in modality else None,
                }
                for text, image in items
            ],
        ).float()
        for modality in MODALITIES
    }


def paired_sides(
    encoder: Encoder, data: EmojiData, indices: np.ndarray
) -> list[tuple[Embeddings, Embeddings]]:
    """The query side and the candidate side of each tree."""
    embedded = {side: embed_side(encoder, data, indices, side) for side in SIDES}
    return [(embedded[side], embedded[other_side(side)]) for side in SIDES]
