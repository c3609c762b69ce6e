"""Figures of rankings, by trec_eval (`pytrec_eval-terrier`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytrec_eval

Ranking = Mapping[str, Sequence[str]]
"""For each query's id the ids of its candidates, the nearest first."""


def run_of(ranking: Ranking) -> dict[str, dict[str, float]]:
    """A run as trec_eval wants it, with scores made from the ranks.

    Of similarities it makes another order: it rounds them to float32 and sorts equal ones by id.
    """
    return {
        qid: {did: float(len(dids) - rank) for rank, did in enumerate(dids)}
        for qid, dids in ranking.items()
    }


def figures(
    qrels: Mapping[str, Mapping[str, int]], ranking: Ranking, cutoffs: Sequence[int]
) -> dict[str, dict[str, float]]:
    """For each query's id its figures, from 0 to 1.

    - `hit@k`: 1 where a positive is among the first k. trec_eval's `success_k`, the "Recall@k" of
      M-BEIR, the `hit_rate_at_k` of mteb.
    - `recall@k`: the share of its positives among the first k, trec_eval's `recall_k`.
    - `mrr`: 1 / rank of the first positive in the ranking, 0 where it has none.
    """
    ks = ",".join(map(str, cutoffs))
    evaluator = pytrec_eval.RelevanceEvaluator(
        {qid: dict(dids) for qid, dids in qrels.items()},
        {f"success.{ks}", f"recall.{ks}", "recip_rank"},
    )
    names = {"mrr": "recip_rank"}
    names |= {f"hit@{k}": f"success_{k}" for k in cutoffs}
    names |= {f"recall@{k}": f"recall_{k}" for k in cutoffs}
    return {
        qid: {name: of_query[theirs] for name, theirs in names.items()}
        for qid, of_query in evaluator.evaluate(run_of(ranking)).items()
    }
