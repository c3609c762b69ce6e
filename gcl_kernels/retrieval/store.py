"""Embeddings on disk, by the key of what was embedded; they outlive the process.

A folder holds one sub-folder an encoder:

    meta.json        which encoder (see `Identity`), and dtype and dimensions of a row
    embeddings.bin   [n, D] unit rows, in the order in which they were made
    keys.bin         [n] keys of 16 bytes (see `Items.keys`)

A row is written before its key: whatever interrupts a run, the rows that have keys are whole, and
the rest of the file is cut off when it is opened again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

try:
    import fcntl
except ImportError:  # Windows: nothing stops two processes there
    fcntl = None  # type: ignore[assignment]

KEY = np.dtype("S16")
PROBE_TOLERANCE = 1e-5
"""How far a component of a probe's unit embedding may move: more than another number of threads
moves it in float32, and less than rounding to half precision does, so whoever stays within it may
have the old embeddings."""


@dataclass(frozen=True)
class Identity:
    """What tells encoders apart, so that none is given another's embeddings.

    Args:
        name: of its class or function.
        fingerprint: its own word on what it is, "" where it has none.
        probe: its unit embeddings of fixed items, None for one that it does not embed.
    """

    name: str
    fingerprint: str
    probe: list[list[float] | None]

    def same(self, meta: dict[str, Any]) -> bool:
        """Whether a folder's `meta` is of this encoder."""
        if (self.name, self.fingerprint) != (meta["name"], meta["fingerprint"]):
            return False
        for mine, other in zip(self.probe, meta["probe"], strict=True):
            if mine is None or other is None or len(mine) != len(other):
                if mine is not other:
                    return False
            elif np.abs(np.subtract(mine, other)).max() > PROBE_TOLERANCE:
                return False
        return True


class Store:
    """The embeddings of one encoder, in the folder that is its own.

    Args:
        root: the folder of all encoders, made where it is missing.
        identity: of the encoder.
        dtype: of a row; other dtypes have other sub-folders.
        temporary: it need not survive that the machine stops.

    Raises:
        RuntimeError: another process is writing there.
    """

    def __init__(
        self, root: Path, identity: Identity, dtype: DTypeLike, temporary: bool = False
    ) -> None:
        self.identity = identity
        self.temporary = temporary
        self.dtype = np.dtype(dtype)
        self.dim = 0
        self.folder, self._lock = self._open(root)
        self._count = self._whole_rows()
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def _open(self, root: Path) -> tuple[Path, IO[str]]:
        name = "".join(letter if letter.isalnum() else "-" for letter in self.identity.name)
        number = 0
        while True:
            folder = root / f"{name}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            meta = _meta(folder)
            if meta is None or meta["dtype"] == self.dtype.name and self.identity.same(meta):
                lock = _lock(folder)
                if meta is not None and lock is None:
                    raise RuntimeError(f"{folder}: another process is writing embeddings there")
                if lock is not None and _meta(folder) == meta:
                    self.dim = 0 if meta is None else meta["dim"]
                    return folder, lock
            number += 1

    def _whole_rows(self) -> int:
        """Their number; what an interruption left of a row or a key goes."""
        widths = {"embeddings.bin": self.dim * self.dtype.itemsize, "keys.bin": KEY.itemsize}
        sizes = {name: _size(self.folder / name) for name in widths}
        count = min(sizes[name] // width if width else 0 for name, width in widths.items())
        for name, width in widths.items():
            if sizes[name] > count * width:
                os.truncate(self.folder / name, count * width)
        return count

    def __len__(self) -> int:
        return self._count

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """
        Args:
            keys: [n], none of them here yet.
            rows: [n, D], of unit length.
        """
        if not self.dim:
            self.dim = rows.shape[1]
            meta = {**asdict(self.identity), "dtype": self.dtype.name, "dim": self.dim}
            draft = self.folder / "meta.json.draft"
            draft.write_text(json.dumps(meta))
            draft.replace(self.folder / "meta.json")
        for name, array in (("embeddings.bin", rows.astype(self.dtype)), ("keys.bin", keys)):
            with open(self.folder / name, "ab") as file:
                file.write(np.ascontiguousarray(array).tobytes())
                if not self.temporary:  # the row before its key, though the machine stops
                    file.flush()
                    os.fsync(file.fileno())
        self._count += len(keys)
        self._index = None

    @property
    def rows(self) -> np.ndarray:
        """[n, D], memory-mapped."""
        shape = (self._count, self.dim)
        if not self._count:
            return np.empty(shape, self.dtype)
        return np.memmap(self.folder / "embeddings.bin", self.dtype, "r", shape=shape)

    def places(self, keys: np.ndarray) -> np.ndarray:
        """[n] row of each key, -1 where it has none."""
        if not self._count:
            return np.full(len(keys), -1)
        if self._index is None:
            known = np.fromfile(self.folder / "keys.bin", KEY)
            order = np.argsort(known)
            self._index = known[order], order
        ordered, order = self._index
        found = np.searchsorted(ordered, keys).clip(max=len(ordered) - 1)
        return np.where(ordered[found] == keys, order[found], -1)

    def close(self) -> None:
        self._lock.close()


def _meta(folder: Path) -> dict[str, Any] | None:
    path = folder / "meta.json"
    return json.loads(path.read_text()) if path.exists() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _lock(folder: Path) -> IO[str] | None:
    """A file that is locked until it is closed or the process ends; None where another has it."""
    file = open(folder / "lock", "w")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
