"""M-BEIR (UniIR, Wei et al., 2024): sixteen pairs of a data set and a task, two pools.

    query/{split}/mbeir_{name}_{split}.jsonl             queries, name as "cirr_task7"
    cand_pool/local/mbeir_{name}_cand_pool.jsonl         candidates of the task
    cand_pool/global/mbeir_union_{split}_cand_pool.jsonl candidates of all tasks
    qrels/{split}/mbeir_{name}_{split}_qrels.txt         qid 0 did relevance task
    instructions/query_instructions.tsv                  up to four prompts a kind of query

Rules read from UniIR's evaluation (98dc570), which moves with each of them: see `text.tidy`, and
below.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

from gcl_kernels.retrieval.datasets import DataError, Items, RetrievalDataset
from gcl_kernels.retrieval.files import json_lines, lines
from gcl_kernels.retrieval.text import tidy

TASKS = {
    0: "t->i", 1: "t->t", 2: "t->it", 3: "i->t", 4: "i->i", 5: "i->it", 6: "it->t", 7: "it->i",
    8: "it->it",
}  # fmt: skip
FASHION = ("fashion200k", "fashioniq")
UNION_CUTOFF = 50
"""The figure of the union pool in the tables of the GCL paper."""

Pool = Literal["local", "union"]
Instructions = Literal["first"] | int | None


class _Pool(Items):
    """Candidates, and the modality that each is said to have, in `_modality`'s spelling."""

    def __init__(self, source: str, skip_missing: bool) -> None:
        super().__init__(source, skip_missing=skip_missing)
        self.modalities: list[str] = []


_POOLS: WeakValueDictionary[tuple[Any, ...], _Pool] = WeakValueDictionary()
"""Pools that a data set in use holds: the union pool is read once for all tasks."""


def load_mbeir(
    root: str | os.PathLike[str],
    name: str,
    pool: Pool = "local",
    instructions: Instructions = None,
    split: str = "test",
    skip_missing: bool = False,
) -> RetrievalDataset:
    """One task of M-BEIR.

    Qrels decide what is relevant. A positive of another data set (OVEN and INFOSEEK have them) is
    not in the local pool and does not count there; in the union pool it does. The benchmark's
    "Recall@k" is `hit@k`: k is 1, 5 and 10, and 10, 20 and 50 for Fashion200K and FashionIQ; the
    figure of the union pool is `hit@50`, as in the GCL paper.

    Args:
        root: the folder of the tree; image paths are relative to it.
        name: such as "cirr_task7".
        instructions: None: queries as they are. "first": the first prompt that is not empty. A
            seed: one of those, drawn for each query by the seed and its id.
        skip_missing: leave out what is missing, with what depends on it, and count it in
            `left_out`.

    Raises:
        DataError: a file, an image or a prompt is missing, a malformed line, an unknown id, a query
            without a positive, or a task that is not the other files'.
    """
    if pool not in ("local", "union"):
        raise ValueError(f"pool: expected 'local' or 'union', got {pool!r}")
    if not (instructions in (None, "first") or isinstance(instructions, int)):
        raise ValueError(f"instructions: expected None, 'first' or a seed, got {instructions!r}")
    base, name = Path(os.path.abspath(root)), name.lower()
    candidates = _candidates(base, _pool_path(base, name, pool, split), skip_missing)
    reader = _Queries(base, name, split, candidates, instructions, skip_missing)
    reader.read_qrels(pool)
    reader.read_queries()
    left_out = Counter(
        {"candidates": candidates.left_out, "queries": reader.queries.left_out}
    ) + Counter(reader.left_out)
    cutoffs = (10, 20, 50) if name.startswith(FASHION) else (1, 5, 10)
    return RetrievalDataset(
        name,
        TASKS.get(reader.task, ""),
        reader.queries,
        candidates,
        reader.qrels,
        pool=pool,
        cutoffs=cutoffs if pool == "local" else (*cutoffs, UNION_CUTOFF),
        main_cutoff=UNION_CUTOFF if pool == "union" else 10 if 20 in cutoffs else 5,
        left_out=left_out,
    )


def mbeir_names(root: str | os.PathLike[str], split: str = "test") -> list[str]:
    """What of M-BEIR lies under `root`, in the order of the tasks."""
    files = Path(root, "query", split).glob(f"mbeir_*_{split}.jsonl")
    names = [file.name[len("mbeir_") : -len(f"_{split}.jsonl")] for file in files]
    return sorted(names, key=lambda name: (name.rpartition("_task")[2], name))


class _Queries:
    """Queries, qrels and instructions of one task, in the order in which they can be checked."""

    def __init__(
        self,
        root: Path,
        name: str,
        split: str,
        candidates: _Pool,
        instructions: Instructions,
        skip_missing: bool,
    ) -> None:
        self.root, self.candidates, self.skip_missing = root, candidates, skip_missing
        self.qrels_path = root / "qrels" / split / f"mbeir_{name}_{split}_qrels.txt"
        self.query_path = root / "query" / split / f"mbeir_{name}_{split}.jsonl"
        self.instructions = instructions
        self.prompts = None if instructions is None else _prompts(root)
        number = re.search(r"_task(\d+)$", name)
        self.task = int(number[1]) if number else -1  # -1: the qrels say it
        self.qrels: dict[str, dict[str, int]] = {}
        self.lines: dict[str, int] = {}  # of a query's first positive
        self.queries = Items(str(self.query_path), skip_missing=skip_missing)
        self.left_out: Counter[str] = Counter()

    def missing(self, kind: str, message: str) -> None:
        if not self.skip_missing:
            raise DataError(message)
        self.left_out[kind] += 1

    def read_qrels(self, pool: Pool) -> None:
        for line, text in lines(self.qrels_path):
            where = f"{self.qrels_path}:{line}"
            try:
                qid, _, did, *numbers = text.split()
                relevance, task = map(int, numbers)
            except ValueError:
                raise DataError(
                    f"{where}: expected 'qid 0 did relevance task', got {text.strip()!r}"
                ) from None
            if relevance <= 0:
                continue
            self._agree(task, where)
            if self.candidates.position(did) is not None:
                self.qrels.setdefault(qid, {})[did] = relevance
                self.lines.setdefault(qid, line)
            elif pool == "local" and _dataset(did) != _dataset(qid):
                self.left_out["positives of other data sets"] += 1
            else:
                self.missing("positives", f"{where}: {did} is not in {self.candidates.source}")

    def read_queries(self) -> None:
        for line, record in json_lines(self.query_path):
            where = self.queries.place(line)
            qid = str(record.get("qid", ""))
            positives = _positive_ids(record.get("pos_cand_list"), where)
            if record.get("task_id") is not None:
                self._agree(record["task_id"], where)
            if qid not in self.qrels:
                self.missing(
                    "queries without a positive",
                    f"{where}: query {qid} has no positive of the pool in {self.qrels_path}",
                )
                continue
            text, image = record.get("query_txt"), record.get("query_img_path")
            modality = _modality(record.get("query_modality"), text, image, where)
            if self.prompts is None:
                text = tidy(text)
            else:
                prompt = self._prompt(qid, modality, positives, where)
                text = tidy(f"{tidy(prompt)} {text or ''}")
            self.queries.add(qid, text, _image(self.root, image, where), line)
            self.lines.pop(qid, None)
        for qid, line in self.lines.items():
            self.missing(
                "positives", f"{self.qrels_path}:{line}: query {qid} is not in {self.query_path}"
            )
        self.qrels = {
            qid: dids for qid, dids in self.qrels.items() if self.queries.position(qid) is not None
        }

    def _agree(self, task: Any, where: str) -> None:
        """The task is one and the same in the name, the qrels and the queries."""
        if self.task < 0:
            self.task = task
        if task != self.task or task not in TASKS:
            expected = self.task if self.task in TASKS else f"one of {sorted(TASKS)}"
            raise DataError(f"{where}: expected task {expected}, got {task!r}")

    def _prompt(self, qid: str, modality: str, positives: list[str], where: str) -> str:
        """As UniIR: by the first positive of the query's own data set."""
        assert self.prompts is not None
        known = [*positives, *self.qrels[qid]]
        own = [did for did in known if _dataset(did) == _dataset(qid)]
        places = map(self.candidates.position, (*own, *known))
        gold = next(place for place in places if place is not None)
        key = (_dataset(qid), modality, self.candidates.modalities[gold])
        choice = self.prompts.get(key)
        if not choice:
            raise DataError(
                f"{_prompts_path(self.root)}: no prompt for data set {key[0]}, query {key[1]}, "
                f"candidate {key[2]} of {where}"
            )
        if self.instructions == "first":
            return choice[0]
        return random.Random(f"{self.instructions} {qid}").choice(choice)


def _dataset(id: str) -> str:
    return id.partition(":")[0]


def _pool_path(root: Path, name: str, pool: Pool, split: str) -> Path:
    if pool == "union":
        return root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl"
    local = root / "cand_pool" / "local"
    of_split = local / f"mbeir_{name}_{split}_cand_pool.jsonl"  # MSCOCO has one for each
    return of_split if of_split.exists() else local / f"mbeir_{name}_cand_pool.jsonl"


def _candidates(root: Path, path: Path, skip_missing: bool) -> _Pool:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    key = (str(path), status.st_size, status.st_mtime_ns, skip_missing)
    pool = _POOLS.get(key)
    if pool is None:
        pool = _Pool(str(path), skip_missing)
        for line, record in json_lines(path):
            where = pool.place(line)
            text, image = record.get("txt"), record.get("img_path")
            modality = _modality(record.get("modality"), text, image, where)
            images = _image(root, image, where)
            if pool.add(record.get("did", ""), tidy(text), images, line):
                pool.modalities.append(modality)
        _POOLS[key] = pool
    return pool


def _image(root: Path, path: Any, where: str) -> list[str]:
    if path is not None and not isinstance(path, str):
        raise DataError(f"{where}: expected an image's path, got {path!r}")
    return [os.path.join(root, path)] if path else []


def _modality(value: Any, text: Any, image: Any, where: str) -> str:
    """ "text", "image" or "image,text": the card spells the last one "text,image"."""
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: expected a text, got {text!r}")
    if value is None:
        value = ",".join(name for name, part in (("image", image), ("text", text)) if part)
    modality = ",".join(sorted(part.strip() for part in str(value).split(",")))
    if modality not in ("text", "image", "image,text"):
        raise DataError(f"{where}: expected a modality of image and text, got {value!r}")
    return modality


def _positive_ids(values: Any, where: str) -> list[str]:
    """Ids in the data, objects with one on the data's card."""
    listed = [] if values is None else values if isinstance(values, list) else [values]
    ids = []
    for value in listed:
        did = value.get("did") if isinstance(value, dict) else value
        if not isinstance(did, str) or listed is not values:
            raise DataError(f"{where}: expected ids in pos_cand_list, got {values!r}")
        ids.append(did)
    return ids


def _prompts_path(root: Path) -> Path:
    return root / "instructions" / "query_instructions.tsv"


def _prompts(root: Path) -> dict[tuple[str, str, str], list[str]]:
    """By data set, query's and candidate's modality: the prompts that are not empty."""
    prompts = {}
    for line, text in _rows(_prompts_path(root)):
        query, candidate, _, dataset, *choice = text
        where = f"{_prompts_path(root)}:{line}"
        key = (
            dataset,
            _modality(query, None, None, where),
            _modality(candidate, None, None, where),
        )
        prompts[key] = [prompt for prompt in choice if prompt.strip()]
    return prompts


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows below the header, which must be the known one."""
    columns = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    for line, text in lines(path):
        row = text.strip("\r\n").split("\t")
        if line == 1 and row[:4] != columns or len(row) < 5:
            raise DataError(
                f"{path}:{line}: expected columns {', '.join(columns)}, prompt_1 and so on, "
                f"got {text.strip()!r}"
            )
        if line > 1:
            yield line, row
