"""Exact search: which candidates stand where for each query, and equal scores lose.

A score is the cosine of two unit embeddings. A candidate whose score equals a positive's stands
before it: a model whose embeddings are all alike finds nothing, in whatever order its equal scores
are sorted. To that end the scores of the few candidates that matter are computed in float64, row by
row, so that equal embeddings have equal scores. The search among all, in float32, only has to find
which they are: its products depend by a rounding on a row's place in a chunk, and `torch.topk`
orders equal ones arbitrarily, so it returns the best that are no positives and `MARGIN` more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

MARGIN = 16
"""Candidates beyond k, since a rounding in float32 may put near ones in another order."""
CHUNK = 32768
"""Candidates at a time: of 512 dimensions 64 MiB in float32."""
QUERIES = 1024
"""Queries at a time: their scores against a chunk are 128 MiB."""
PAIRS = 1 << 13
"""Pairs at a time in float64."""

Pairs = tuple[np.ndarray, np.ndarray]
"""[n] positions of queries and [n] of candidates."""

Search = Literal["torch", "faiss"]


@dataclass(frozen=True)
class Side:
    """Queries or candidates: where in the store their embeddings are.

    Args:
        rows: [R, D], all that is stored, float16 or float32.
        places: [n], of each item its row.
    """

    rows: np.ndarray
    places: np.ndarray

    def take(self, which: np.ndarray) -> np.ndarray:
        """[len(which), D], in the rows' dtype."""
        return self.rows[self.places[which]]

    def __len__(self) -> int:
        return len(self.places)


def nearest(
    queries: Side,
    candidates: Side,
    barred: Pairs,
    count: int,
    device: torch.device,
    method: Search = "torch",
    bar: tqdm[None] | None = None,
) -> Pairs:
    """For each query the candidates of the highest scores, all but the barred ones.

    Memory: the queries in float32, a chunk of candidates, `QUERIES` x `CHUNK` scores, and for each
    query `2 (count + MARGIN)` scores and positions; nothing of the size queries x candidates.

    Args:
        barred: pairs to leave out.
        count: how many to find, `MARGIN` more are returned; all where there are fewer.
        device: where products and `torch.topk` run.
        method: "faiss" has `faiss.knn` search a chunk, on the CPU.
        bar: is told how many candidates were searched.

    Returns:
        Pairs, in no order.
    """
    count = min(count + MARGIN, len(candidates))
    everything = np.arange(len(queries))
    asked = torch.from_numpy(queries.take(everything)).float().to(device)
    scores = torch.full((len(queries), count), -torch.inf, device=device)
    found = torch.full((len(queries), count), -1, dtype=torch.int64, device=device)
    order = np.argsort(candidates.places, kind="stable")  # the disk is read once, front to back
    in_order = np.empty_like(order)
    in_order[order] = np.arange(len(order))
    barred_at = in_order[barred[1]]
    by_place = np.argsort(barred_at, kind="stable")
    barred_query, barred_at = barred[0][by_place], barred_at[by_place]
    best = _best_of_faiss if method == "faiss" else _best_of_torch
    with _float32_products(device):
        for start in range(0, len(order), CHUNK):
            chunk_order = order[start : start + CHUNK]
            chunk = torch.from_numpy(candidates.take(chunk_order)).to(device).float()
            first = int(np.searchsorted(barred_at, start))
            last = int(np.searchsorted(barred_at, start + len(chunk_order)))
            out_query, out_at = barred_query[first:last], barred_at[first:last] - start
            for top in range(0, len(queries), QUERIES):
                rows = slice(top, top + QUERIES)
                here = (out_query >= top) & (out_query < top + QUERIES)
                out = out_query[here] - top, out_at[here]
                values, places = best(asked[rows], chunk, out, min(count, len(chunk_order)))
                values = torch.cat([scores[rows], values], 1)
                places = torch.cat([found[rows], places + start], 1)
                scores[rows], kept = values.topk(count, dim=1)
                found[rows] = places.gather(1, kept)
            if bar is not None:
                bar.update(len(chunk_order))
    real = (scores > -torch.inf).cpu().numpy()
    query = np.broadcast_to(everything[:, None], real.shape)[real]
    return query, order[found.cpu().numpy()[real]]


def _best_of_torch(queries: Tensor, chunk: Tensor, out: Pairs, count: int) -> tuple[Tensor, Tensor]:
    """[Q, count] highest scores and their places in the chunk; -inf where a pair is out."""
    scores = queries @ chunk.T
    scores[torch.from_numpy(out[0]), torch.from_numpy(out[1])] = -torch.inf
    values, places = scores.topk(count, dim=1)
    return values, places


def _best_of_faiss(queries: Tensor, chunk: Tensor, out: Pairs, count: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ImportError as error:
        raise ImportError('search="faiss" needs faiss: pip install faiss-cpu') from error
    most = int(np.bincount(out[0]).max()) if len(out[0]) else 0
    values, places = faiss.knn(
        queries.cpu().numpy(),
        chunk.cpu().numpy(),
        min(count + most, len(chunk)),
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    pairs = np.arange(len(queries))[:, None] * len(chunk) + places
    values[np.isin(pairs, out[0] * len(chunk) + out[1])] = -np.inf
    return torch.from_numpy(values).to(queries.device), torch.from_numpy(places).to(queries.device)


@contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """IEEE products, whatever the user's setting; no gradient, no autocast."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def scores_of(queries: Side, candidates: Side, pairs: Pairs) -> np.ndarray:
    """[n] float64 scores of pairs: equal rows, equal scores."""
    parts = [np.empty(0)]
    for start in range(0, len(pairs[0]), PAIRS):
        some = slice(start, start + PAIRS)
        sides = queries.take(pairs[0][some]), candidates.take(pairs[1][some])
        parts.append(np.einsum("nd,nd->n", *(side.astype(np.float64) for side in sides)))
    return np.concatenate(parts)


def ranked(pairs: Pairs, scores: np.ndarray, positive: np.ndarray, count: int) -> list[np.ndarray]:
    """Of each query the candidates in order, equal scores against the positives.

    Args:
        pairs: at least one of every query.
        scores: [n], of the pairs.
        positive: [n] booleans.
        count: how many candidates of a query to return.

    Returns:
        For each query at most `count` positions of candidates, the nearest first.
    """
    query, candidate = pairs
    order = np.lexsort((candidate, positive, -scores, query))
    ends = np.cumsum(np.bincount(query))
    return [candidate[of_query[:count]] for of_query in np.split(order, ends[:-1])]
