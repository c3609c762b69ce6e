"""MMEB (VLM2Vec, Jiang et al., 2025): every query has candidates of its own, the first is gold.

{subset}/test/*.parquet     columns qry_text, qry_img_path, tgt_text, tgt_img_path, and in later
                            copies qry_inst and tgt_inst
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from gcl_kernels.retrieval.datasets import DataError, Items, RetrievalDataset
from gcl_kernels.retrieval.text import without_image_token


def load_mmeb(
    root: str | os.PathLike[str],
    subset: str,
    split: str = "test",
    images: str | os.PathLike[str] | None = None,
    skip_missing: bool = False,
) -> RetrievalDataset:
    """One subset of MMEB, as `hit@1` (Precision@1) in each row's own candidates.

    Candidates that equal the gold's text and image are the gold, and the gold has to be strictly
    nearer than every other: an `argmax` over equal scores takes the first of the row, which is the
    gold, and credits a model whose embeddings are all equal with 100 %. Here such a model has the
    gold last: of n candidates its reciprocal rank (`mrr`) is 1/n, and `hit@1` is 0, or 1 where the
    gold is alone.

    Args:
        root: the folder of the subsets.
        images: what image paths are relative to; None: `root`.
        skip_missing: leave out what is missing, with what depends on it, and count it in
            `left_out`.

    Raises:
        DataError: a file, column or image is missing, a malformed row, or lists of targets that are
            not of one length.
        ImportError: pyarrow is missing.
    """
    folder = Path(root, subset)
    files = sorted([*folder.glob(f"{split}/*.parquet"), *folder.glob(f"{split}-*.parquet")])
    if not files:
        raise DataError(f"{folder / split}: no parquet files")
    base = os.path.abspath(images or root)
    left_out: Counter[str] = Counter()
    source = str(files[0] if len(files) == 1 else folder)
    queries, candidates = (Items(source, "row", skip_missing) for _ in range(2))
    qrels: dict[str, dict[str, int]] = {}
    lists: dict[str, list[str]] = {}
    ids: dict[tuple[str, str], str | None] = {}  # of a target, None where its image is missing
    for line, row in enumerate(_rows(files), 1):
        where = queries.place(line)
        dids = []
        for text, path in _targets(row, where):
            if (text, path) not in ids:
                did, image = f"c{len(ids)}", [os.path.join(base, path)] if path else []
                ids[text, path] = did if candidates.add(did, text, image, line) else None
            dids.append(ids[text, path])
        gold, qid = dids[0], f"q{line}"
        if gold is None:
            left_out["queries without a positive"] += 1
            continue
        instruction, text, path = (
            _string(row, column, where) for column in ("qry_inst", "qry_text", "qry_img_path")
        )
        image = [os.path.join(base, path)] if path else []
        if queries.add(qid, without_image_token(f"{instruction} {text}"), image, line):
            qrels[qid] = {gold: 1}
            lists[qid] = [did for did in dict.fromkeys(dids) if did is not None]
    if not len(queries):
        raise DataError(f"{queries.source}: no queries")
    left_out += Counter({"queries": queries.left_out, "candidates": candidates.left_out})
    return RetrievalDataset(
        subset,
        f"{_modality(queries[0])}->{_modality(candidates[0])}",
        queries,
        candidates,
        qrels,
        candidate_lists=lists,
        cutoffs=(1,),
        main_cutoff=1,
        left_out=left_out,
    )


def mmeb_subsets(root: str | os.PathLike[str], split: str = "test") -> list[str]:
    """Names of the subsets under `root`."""
    folders = {file.parent.parent for file in Path(root).glob(f"*/{split}/*.parquet")}
    folders |= {file.parent for file in Path(root).glob(f"*/{split}-*.parquet")}
    return sorted(folder.name for folder in folders)


def _rows(files: list[Path]) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("load_mmeb needs pyarrow: pip install pyarrow") from error
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{file}: {error}") from None
        missing = {"qry_text", "qry_img_path", "tgt_text", "tgt_img_path"} - {*table.column_names}
        if missing:
            raise DataError(f"{file}: no column {', '.join(sorted(missing))}")
        yield from table.to_pylist()


def _string(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column) or ""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string in {column}, got {value!r}")
    return value


def _targets(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Text and image path of the row's targets, the gold first; a scalar stands for all."""
    columns = []
    for column in ("tgt_text", "tgt_img_path"):
        value = row[column]
        values = value if isinstance(value, list) else [value]
        columns.append([_string({column: one}, column, where) for one in values])
    length = max(map(len, columns))
    texts, paths = (column * length if len(column) == 1 else column for column in columns)
    if not length == len(texts) == len(paths):
        raise DataError(f"{where}: {len(texts)} entries in tgt_text, {len(paths)} in tgt_img_path")
    instruction = _string(row, "tgt_inst", where)
    return [
        (without_image_token(f"{instruction} {text}"), path)
        for text, path in zip(texts, paths, strict=True)
    ]


def _modality(item: dict[str, Any]) -> str:
    return ("i" if item["images"] else "") + ("t" if item["text"] else "")
