"""From an encoder and data sets to figures."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from tqdm import tqdm

from gcl_kernels.retrieval.datasets import RetrievalDataset
from gcl_kernels.retrieval.encode import Encoder, embed, identify
from gcl_kernels.retrieval.metrics import figures, run_of
from gcl_kernels.retrieval.search import Pairs, Search, Side, nearest, ranked, scores_of
from gcl_kernels.retrieval.store import Identity, Store


@dataclass(frozen=True, eq=False)
class Result:
    """The figures of one data set: `result["hit@5"]`, from 0 to 1.

    Attributes:
        name, pool, task, cutoffs: the data set's.
        main: the figure that the benchmark reports, such as "hit@5".
        queries, candidates: how many there are.
        metrics: by name, means over queries: see `metrics.figures`.
        per_query: for each query's id its figures.
        ranking: for each query's id the first candidates' ids, as many as the largest k.
        qrels: the data set's.
        left_out: what was skipped, and how often.
    """

    name: str
    pool: str
    task: str
    cutoffs: tuple[int, ...]
    main: str
    queries: int
    candidates: int
    metrics: Mapping[str, float]
    per_query: Mapping[str, Mapping[str, float]]
    ranking: Mapping[str, Sequence[str]]
    qrels: Mapping[str, Mapping[str, int]]
    left_out: Mapping[str, int]

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric]

    @property
    def run(self) -> dict[str, dict[str, float]]:
        """For each query's id the candidates' scores, made from the ranks: `trec_eval`'s run."""
        return run_of(self.ranking)


@overload
def evaluate(
    encoder: Encoder, datasets: RetrievalDataset, *args: Any, **options: Any
) -> Result: ...
@overload
def evaluate(
    encoder: Encoder, datasets: Sequence[RetrievalDataset], *args: Any, **options: Any
) -> list[Result]: ...
def evaluate(
    encoder: Encoder,
    datasets: RetrievalDataset | Sequence[RetrievalDataset],
    k: Sequence[int] = (1, 5, 10, 20, 50),
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
    *,
    embeddings: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
    search: Search = "torch",
) -> Result | list[Result]:
    """Embeds, searches, counts.

    What several data sets or pools share is embedded once. Embeddings are on disk, memory-mapped:
    N of D dimensions take `N (D itemsize + 16)` bytes there.

    Args:
        encoder: see `encode.Encoder`.
        datasets: one, or several.
        k: cutoffs, beside those of the data sets. A pool smaller than k is searched whole.
        batch_size: images or texts a call of the encoder.
        device: where the search multiplies; None: a GPU if there is one. The encoder has its own.
        progress: bars with rates, on standard error.
        embeddings: a folder to keep embeddings in: a second evaluation, or one that was
            interrupted, goes on where it was. It holds those of several encoders apart, see
            `store.Identity`. None: a temporary folder (`TMPDIR`).
        dtype: of the embeddings: float32, or float16 at half the size, as UniIR has them.
        workers: threads that load images.
        search: "torch", or "faiss" on the CPU where it is installed.

    Returns:
        A `Result`, or a list of them where several data sets were given.

    Raises:
        DataError: see `encode.embed`.
        ValueError: an encoder that cannot be told from others, where `embeddings` are kept.
        RuntimeError: another process is writing to `embeddings`.
    """
    several = [datasets] if isinstance(datasets, RetrievalDataset) else list(datasets)
    if not several:
        raise ValueError("datasets: expected at least one")
    if search not in ("torch", "faiss"):
        raise ValueError(f"search: expected 'torch' or 'faiss', got {search!r}")
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"dtype: expected torch.float16 or torch.float32, got {dtype}")
    for name, numbers in (("k", k), ("batch_size", [batch_size]), ("workers", [workers])):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name}: expected at least 1, got {numbers!r}")
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="embeddings-", ignore_cleanup_errors=True) as folder:
        if embeddings is None:
            root, identity = Path(folder), Identity("encoder", "", [])
        else:
            root, identity = Path(embeddings), identify(encoder)
        store = Store(root, identity, str(dtype).removeprefix("torch."), embeddings is None)
        try:
            sides = {id(items): items for d in several for items in (d.candidates, d.queries)}
            embed(encoder, [*sides.values()], store, batch_size, workers, progress)
            places = {key: store.places(items.keys) for key, items in sides.items()}
            rows, results = store.rows, []
            for dataset in several:
                queries, candidates = (
                    Side(rows, places[id(items)]) for items in (dataset.queries, dataset.candidates)
                )
                cutoffs = sorted({*k, *dataset.cutoffs, dataset.main_cutoff})
                bar = tqdm(
                    total=len(candidates),
                    desc=f"searching {dataset.title}",
                    unit="candidate",
                    unit_scale=True,
                    disable=not progress or dataset.candidate_lists is not None,
                )
                with bar:
                    rankings = _rankings(dataset, queries, candidates, cutoffs[-1], on, search, bar)
                results.append(_result(dataset, rankings, cutoffs))
        finally:
            store.close()
    return results[0] if isinstance(datasets, RetrievalDataset) else results


def _rankings(
    dataset: RetrievalDataset,
    queries: Side,
    candidates: Side,
    count: int,
    device: torch.device,
    search: Search,
    bar: tqdm,
) -> list[np.ndarray]:
    """Of each query the positions of its candidates, the nearest first: `count`, or its list."""
    positive, excluded = dataset.pairs(dataset.positives()), dataset.pairs(dataset.exclude)
    if dataset.candidate_lists is None:
        barred = _joined(positive, excluded)
        others = nearest(queries, candidates, barred, count, device, search, bar)
        pairs = _joined(others, positive)
        is_positive = np.arange(len(pairs[0])) >= len(others[0])
    else:
        pairs = dataset.pairs(dataset.candidate_lists)
        codes = _codes(pairs, candidates)
        inside = ~np.isin(codes, _codes(excluded, candidates))
        pairs = pairs[0][inside], pairs[1][inside]
        is_positive = np.isin(codes[inside], _codes(positive, candidates))
        count = len(candidates)
    return ranked(pairs, scores_of(queries, candidates, pairs), is_positive, count)


def _joined(first: Pairs, second: Pairs) -> Pairs:
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def _codes(pairs: Pairs, candidates: Side) -> np.ndarray:
    """[n], one number a pair."""
    return pairs[0] * len(candidates) + pairs[1]


def _result(
    dataset: RetrievalDataset, rankings: list[np.ndarray], cutoffs: Sequence[int]
) -> Result:
    ids = dataset.candidates.ids
    ranking = {
        qid: [ids[place] for place in places]
        for qid, places in zip(dataset.queries.ids, rankings, strict=True)
    }
    per_query = figures(dataset.qrels, ranking, cutoffs)
    names = next(iter(per_query.values()))
    means = {
        name: math.fsum(of_query[name] for of_query in per_query.values()) / len(per_query)
        for name in names
    }
    return Result(
        name=dataset.name,
        pool=dataset.pool,
        task=dataset.task,
        cutoffs=dataset.cutoffs,
        main=f"hit@{dataset.main_cutoff}",
        queries=len(dataset.queries),
        candidates=len(dataset.candidates),
        metrics=means,
        per_query=per_query,
        ranking={qid: dids[: cutoffs[-1]] for qid, dids in ranking.items()},
        qrels=dataset.qrels,
        left_out=dataset.left_out,
    )
