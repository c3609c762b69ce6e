"""A bridge to mteb (2.26): its tasks for an encoder of here, and a data set of here as its task.

mteb is a second judge of the figures, and has M-BEIR's local pools as tasks of its own. It embeds
an item as often as it stands somewhere, and knows no clips.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from gcl_kernels.retrieval.datasets import Items, RetrievalDataset
from gcl_kernels.retrieval.encode import Encoder, unit_embeddings


def as_mteb_model(encoder: Encoder, name: str = "gcl_kernels/encoder") -> Any:
    """A model for `mteb.evaluate`: cosine similarity of what the encoder gives.

    mteb's prompts are not used: put instructions into the items of the encoder.

    Args:
        name: "organisation/model", under which mteb files the results.

    Raises:
        ImportError: mteb is missing.
    """
    _mteb()
    from mteb.models import ModelMeta

    meta = ModelMeta.create_empty(overwrites={"name": name, "modalities": ["image", "text"]})
    return _Model(encoder, meta)


class _Model:
    """mteb's `EncoderProtocol`."""

    def __init__(self, encoder: Encoder, meta: Any) -> None:
        self.encoder = encoder
        self.mteb_model_meta = meta

    def encode(self, inputs: Iterable[dict[str, Any]], **_: Any) -> np.ndarray:
        """[n, D] float32 of batches of columns, `text` and `image` among them."""
        parts = []
        for batch in inputs:
            texts, images = batch.get("text"), batch.get("image")
            items = [
                {
                    "text": (texts[i] or None) if texts else None,
                    "image": images[i].convert("RGB") if images and images[i] else None,
                }
                for i in range(len(texts or images or ()))
            ]
            prepare = getattr(self.encoder, "prepare", None)
            for item in items:
                if prepare is not None and item["image"] is not None:
                    item["image"] = prepare(item["image"])
            parts.append(unit_embeddings(self.encoder, items).float().numpy())
        return np.concatenate(parts)

    def similarity(self, first: Any, second: Any) -> torch.Tensor:
        return torch.as_tensor(first) @ torch.as_tensor(second).T

    def similarity_pairwise(self, first: Any, second: Any) -> torch.Tensor:
        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(1)


def as_mteb_task(dataset: RetrievalDataset) -> Any:
    """A task for `mteb.evaluate` whose `hit_rate_at_k` and `recall_at_k` are `hit@k`, `recall@k`.

    They are the same where no scores tie: mteb orders equal scores arbitrarily. Candidate lists and
    exclusions are given to it as lists of candidates.

    Raises:
        ImportError: mteb is missing.
        ValueError: an item is a clip of several frames.
    """
    _mteb()
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    sides = [_columns(items) for items in (dataset.queries, dataset.candidates)]
    kinds = ["".join(kind for kind in ("i", "t") if kind in side) for side in sides]
    letters = {"i": "image", "t": "text"}
    lists: dict[str, list[str]] | None = None
    if dataset.candidate_lists is not None or dataset.exclude:
        lists = {
            qid: [
                did
                for did in (dataset.candidate_lists or {}).get(qid, dataset.candidates.ids)
                if did not in dataset.exclude.get(qid, ())
            ]
            for qid in dataset.queries.ids
        }

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=dataset.title,
            description=f"{dataset.title}, of gcl_kernels.retrieval",
            dataset={"path": "local", "revision": "local"},
            type="Any2AnyRetrieval",
            category="2".join(kinds),
            modalities=sorted({letters[letter] for kind in kinds for letter in kind}),
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score=f"hit_rate_at_{dataset.main_cutoff}",
        )
        k_values = tuple(sorted({1, *dataset.cutoffs, dataset.main_cutoff}))  # it needs the 1

        def load_data(self, *_: Any, **__: Any) -> None:
            self.dataset = {
                "default": {
                    "test": {
                        "queries": _table(sides[0]),
                        "corpus": _table(sides[1]),
                        "relevant_docs": {q: dict(d) for q, d in dataset.qrels.items()},
                        "top_ranked": lists,
                    }
                }
            }
            self.data_loaded = True

    return Task()


def _columns(items: Items) -> dict[str, list[Any]]:
    """Columns id and, where any item has them, t and i."""
    rows = [items[i] for i in range(len(items))]
    if any(len(row["images"]) > 1 for row in rows):
        raise ValueError(f"{items.source}: mteb knows no clips of several frames")
    columns: dict[str, list[Any]] = {"id": items.ids}
    if any(row["text"] for row in rows):
        columns["t"] = [row["text"] or "" for row in rows]  # it refuses None
    if any(row["images"] for row in rows):
        columns["i"] = [row["images"][0] if row["images"] else None for row in rows]
    return columns


def _table(columns: dict[str, list[Any]]) -> Any:
    import datasets

    names = {"id": "id", "t": "text", "i": "image"}
    table = datasets.Dataset.from_dict({names[name]: list(c) for name, c in columns.items()})
    return table.cast_column("image", datasets.Image()) if "i" in columns else table


def _mteb() -> None:
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise ImportError('the bridge needs mteb: pip install "gcl_kernels[mteb]"') from error
