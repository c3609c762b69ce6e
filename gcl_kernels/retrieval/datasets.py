"""Queries, candidates, and which of them belong together: what every reader returns."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODALITIES = ("i", "t", "it")
TASKS = tuple(f"{query}->{candidate}" for query in MODALITIES for candidate in MODALITIES)


class DataError(ValueError):
    """A fault in the data; the message begins with its file and line."""


class Items:
    """Queries or candidates, in columns: millions fit into memory.

    `items[i]` is `{"id": str, "text": str or None, "images": tuple of paths}`. Several images are
    the frames of one clip.

    Args:
        source: the file they come from, for messages.
        unit: what `line` counts there.
        skip_missing: leave out an item whose image is missing, and count it in `left_out`.
    """

    def __init__(self, source: str, unit: str = "line", skip_missing: bool = False) -> None:
        self.source = source
        self.unit = unit
        self.skip_missing = skip_missing
        self.left_out = 0
        self.ids: list[str] = []
        self._texts: list[str | None] = []
        self._images: list[str | tuple[str, ...] | None] = []
        self._lines = array("I")
        self._digests = bytearray()
        self._positions: dict[str, int] = {}

    @classmethod
    def of(cls, source: str, items: Iterable[Mapping[str, Any]]) -> Items:
        """From mappings with `id`, and `text` or `image` (a path, or a clip's paths)."""
        collected = cls(source, "item")
        for line, item in enumerate(items, 1):
            image = item.get("image") or ()
            paths = [image] if isinstance(image, str | os.PathLike) else image
            collected.add(item["id"], item.get("text"), map(os.path.abspath, paths), line)
        return collected

    def add(self, id: str, text: str | None, images: Iterable[str], line: int) -> bool:
        """
        Args:
            images: absolute paths; None among them is an absent image.

        Returns:
            Whether it was added: not where `skip_missing` left it out.

        Raises:
            DataError: an id that is not new or has white space, nothing to encode, or an image that
                is missing or empty.
        """
        where = self.place(line)
        if not isinstance(id, str) or len(id.split()) != 1 or id != id.strip():
            # A line of a TREC file is split at white space.
            raise DataError(f"{where}: expected an id without white space, got {id!r}")
        if id in self._positions:
            raise DataError(f"{where}: {id} again, after {self.where(self._positions[id])}")
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: expected a text, got {text!r}")
        paths = tuple(images)
        if not text and not paths:
            raise DataError(f"{where}: {id} has neither a text nor an image")
        parts = [text or ""]
        for path in paths:
            stamp = _stamp(path)
            if stamp is None:
                if not self.skip_missing:
                    raise DataError(f"{where}: missing or empty image {path}")
                self.left_out += 1
                return False
            parts += (path, stamp)
        content = "\0".join(parts).encode("utf-8", "surrogatepass")
        self._digests += hashlib.blake2b(content, digest_size=16).digest()
        self._positions[id] = len(self.ids)
        self.ids.append(id)
        self._texts.append(text or None)
        self._images.append(paths if len(paths) > 1 else paths[0] if paths else None)
        self._lines.append(line)
        return True

    def place(self, line: int) -> str:
        """A line of the source, as messages name it."""
        return (
            f"{self.source}:{line}" if self.unit == "line" else f"{self.source}, {self.unit} {line}"
        )

    def where(self, position: int) -> str:
        return self.place(self._lines[position])

    def position(self, id: str) -> int | None:
        """Where it stands, None where it is not among them."""
        return self._positions.get(id)

    def frames(self, position: int) -> int:
        """How many images it has."""
        images = self._images[position]
        return 0 if images is None else 1 if isinstance(images, str) else len(images)

    @property
    def keys(self) -> np.ndarray:
        """[n] of 16 bytes: items of one key have the same text and images, so one embedding.

        Of an image they hold its path, size and time: a file that was replaced has another key.
        """
        return np.frombuffer(bytes(self._digests), dtype="S16")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> dict[str, Any]:
        images = self._images[position]
        paths = (images,) if isinstance(images, str) else images or ()
        return {"id": self.ids[position], "text": self._texts[position], "images": paths}


def _stamp(path: str) -> str | None:
    """Size and time of a file, None where it is missing or empty."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{status.st_size} {status.st_mtime_ns}" if status.st_size else None


@dataclass(frozen=True, eq=False)
class RetrievalDataset:
    """One retrieval task: made by the readers, or by hand.

    Args:
        name: as in reports and run files.
        task: the modalities of query and candidate, one of `TASKS` (`"t->it"`): where the figures
            stand in the report. What is encoded is what an item has.
        queries, candidates: `Items`, or mappings with `id`, and `text` or `image` (a path, or a
            clip's paths).
        qrels: for each query's id the relevance of candidates' ids; more than 0 is a positive.
            Every query has one.
        candidate_lists: for each query's id the candidates it is searched in, its positives among
            them; None: all.
        exclude: for some queries' ids the candidates that are left out of the search.
        pool: "local" or "union", where a benchmark has both.
        cutoffs: the benchmark's own k.
        main_cutoff: the k whose hit@k the benchmark reports as the task's figure.
        left_out: what a reader skipped, and how often.

    Raises:
        DataError: an unknown id or task, a query without a positive, a positive out of reach.
    """

    name: str
    task: str
    queries: Items
    candidates: Items
    qrels: Mapping[str, Mapping[str, int]]
    candidate_lists: Mapping[str, Sequence[str]] | None = None
    exclude: Mapping[str, Collection[str]] = field(default_factory=dict)
    pool: str = ""
    cutoffs: tuple[int, ...] = (1, 5, 10)
    main_cutoff: int = 5
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in ("queries", "candidates"):
            given = getattr(self, side)
            if not isinstance(given, Items):
                object.__setattr__(self, side, Items.of(f"{self.name} {side}", given))
        if not len(self.queries):
            raise DataError(f"{self.queries.source}: no queries")
        if self.task not in TASKS:
            raise DataError(
                f"{self.name}: expected a task of {', '.join(TASKS)}, got {self.task!r}"
            )
        for what, table in (("qrels", self.qrels), ("exclude", self.exclude)):
            for qid in table:
                if self.queries.position(qid) is None:
                    raise DataError(f"{self.name}: {what} name an unknown query {qid}")
        positives = self.positives()
        for position, qid in enumerate(self.queries.ids):
            problem = self._problem(qid, positives.get(qid, []))
            if problem:
                raise DataError(f"{self.queries.where(position)}: query {qid} {problem}")

    def _problem(self, qid: str, positives: list[str]) -> str | None:
        excluded = self.exclude.get(qid, ())
        within = None if self.candidate_lists is None else self.candidate_lists.get(qid, ())
        for did in (*positives, *(within or ()), *excluded):
            if self.candidates.position(did) is None:
                return f"names an unknown candidate {did}"
        if not positives:
            return "has no positive"
        if within is not None and len(set(within)) != len(within):
            return "lists a candidate twice"
        for did in positives:
            if did in excluded or within is not None and did not in within:
                return f"is not searched in its positive {did}"
        return None

    @property
    def title(self) -> str:
        """The name, and the pool where there are several."""
        return f"{self.name} ({self.pool})" if self.pool else self.name

    def positives(self) -> dict[str, list[str]]:
        """For each query's id the ids of its positives."""
        return {
            qid: [did for did, relevance in dids.items() if relevance > 0]
            for qid, dids in self.qrels.items()
        }

    def pairs(self, table: Mapping[str, Iterable[str]]) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions of queries and of candidates, from candidates' ids by query's id."""
        flat = array("q")
        for position, qid in enumerate(self.queries.ids):
            for did in table.get(qid, ()):
                flat.extend((position, self.candidates._positions[did]))
        both = np.array(flat, dtype=np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]
