"""From items to unit embeddings: batches, images loaded by workers, clips, what is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gcl_kernels.retrieval.datasets import DataError, Items
from gcl_kernels.retrieval.store import PROBE_TOLERANCE, Identity, Store

AHEAD = 2
"""Batches that workers load while one is encoded."""


class Encoder(Protocol):
    """Any callable that embeds items.

    It may have two more attributes:

    - `prepare(image)`: what workers do to a PIL image after they have loaded it; an item's image is
      then what it returns (a transform, which would otherwise run between the batches).
    - `fingerprint`: a string that changes whenever its embeddings do. Encoders are told apart by it
      and by how they embed a few fixed items.
    """

    def __call__(self, items: list[dict[str, Any]]) -> Tensor:
        """
        Args:
            items: each `{"text": str or None, "image": PIL image (RGB) or None}`, never both None.

        Returns:
            Tensor: [len(items), D], floating point, raw or of unit length, on any device.
        """
        ...


@torch.inference_mode()
def embed(
    encoder: Encoder,
    collections: Sequence[Items],
    store: Store,
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    """Embeds what is not in the store, every distinct content once.

    A clip's frames are embedded one by one: the unit vectors' mean, normalised.

    Raises:
        DataError: an image that cannot be read; embeddings of another shape than [B, D], or that
            are not finite. What was embedded before it stays in the store.
    """
    keys = np.concatenate([items.keys for items in collections])
    _, first = np.unique(keys, return_index=True)
    first.sort()
    todo = first[store.places(keys[first]) < 0]
    bar = tqdm(
        total=len(first),
        initial=len(first) - len(todo),
        desc="embedding",
        unit="item",
        disable=not progress,
    )
    with bar, ThreadPoolExecutor(workers) as pool:

        def load(batch: Batch) -> list[Future[list[list[dict[str, Any]]]]]:
            share = -(-len(batch) // workers)
            parts = [batch[i : i + share] for i in range(0, len(batch), share)]
            return [pool.submit(_inputs, encoder, part) for part in parts]

        try:
            done = 0
            for batch, loading in _ahead(load, _batches(collections, todo, batch_size)):
                inputs = [entries for future in loading for entries in future.result()]
                rows = _pooled(encoder, batch, inputs, batch_size)
                store.append(keys[todo[done : done + len(batch)]], rows.numpy())
                done += len(batch)
                bar.update(len(batch))
        finally:
            pool.shutdown(cancel_futures=True)


Batch = list[tuple[Items, int]]
"""Items by their collection and their position in it."""


def _batches(collections: Sequence[Items], todo: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Of about `batch_size` images or texts; `todo` counts through all collections."""
    starts = np.cumsum([0, *map(len, collections)])
    which = np.searchsorted(starts, todo, "right") - 1
    batch: Batch = []
    frames = 0
    for number, position in zip(which.tolist(), (todo - starts[which]).tolist(), strict=True):
        batch.append((collections[number], position))
        frames += max(collections[number].frames(position), 1)
        if frames >= batch_size:
            yield batch
            batch, frames = [], 0
    if batch:
        yield batch


def _ahead(load: Callable[[Batch], Any], batches: Iterator[Batch]) -> Iterator[tuple[Batch, Any]]:
    """Each batch and what `load` returns, which is called `AHEAD` batches before."""
    begun: deque[tuple[Batch, Any]] = deque()
    for batch in batches:
        begun.append((batch, load(batch)))
        if len(begun) > AHEAD:
            yield begun.popleft()
    yield from begun


def _inputs(encoder: Encoder, batch: Batch) -> list[list[dict[str, Any]]]:
    """What the encoder gets of each item: one entry, or one a frame."""
    prepare = getattr(encoder, "prepare", None)
    inputs = []
    for items, position in batch:
        item = items[position]
        images: list[Any] = []
        for path in item["images"]:
            try:
                with Image.open(path) as file:
                    images.append(file.convert("RGB"))
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(
                    f"{items.where(position)}: cannot read image {path}: {error}"
                ) from error
        if prepare is not None:
            images = [prepare(image) for image in images]
        inputs.append([{"text": item["text"], "image": image} for image in images or [None]])
    return inputs


def _pooled(
    encoder: Encoder, batch: Batch, inputs: list[list[dict[str, Any]]], batch_size: int
) -> Tensor:
    """[len(batch), D] float64 unit embeddings of items, each from its frames."""
    flat = [entry for entries in inputs for entry in entries]
    unit = torch.cat(
        [
            unit_embeddings(encoder, flat[i : i + batch_size])
            for i in range(0, len(flat), batch_size)
        ]
    )
    if len(flat) > len(inputs):
        counts = [len(entries) for entries in inputs]
        unit = torch.stack([_pool(frames) for frames in unit.split(counts)])
    bad = (~torch.isfinite(unit.sum(1))).nonzero().flatten().tolist()
    if bad:
        items, position = batch[bad[0]]
        raise DataError(
            f"{items.where(position)}: the embedding of {items.ids[position]} is not finite"
        )
    return unit


def _pool(frames: Tensor) -> Tensor:
    """[D] of [n, D]: their mean, of unit length; one frame stays as it is."""
    return frames[0] if len(frames) == 1 else F.normalize(frames.mean(0), dim=0)


def unit_embeddings(encoder: Encoder, items: list[dict[str, Any]]) -> Tensor:
    """[len(items), D] in float64, which no length overflows; a row of length 0 stays 0."""
    raw = encoder(items)
    if not isinstance(raw, Tensor) or raw.ndim != 2 or len(raw) != len(items):
        got = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise DataError(f"encoder: expected a tensor of shape ({len(items)}, D), got {got}")
    return F.normalize(raw.cpu().double(), dim=1)


@torch.inference_mode()
def identify(encoder: Encoder) -> Identity:
    """What tells this encoder from others, and from itself with other weights.

    Raises:
        ValueError: it has no fingerprint and embeds none of the probes, or embeds one differently
            every time.
    """
    gradient = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    prepare = getattr(encoder, "prepare", None)
    image = gradient if prepare is None else prepare(gradient)
    text = "A photo of a cat."
    probe: list[list[float] | None] = []
    for item in ({"text": text, "image": None}, {"text": None, "image": image},
                 {"text": text, "image": image}):  # fmt: skip
        try:
            once, again = (unit_embeddings(encoder, [dict(item)]) for _ in range(2))
        except Exception:  # one that takes only texts says so in its own way
            probe.append(None)
            continue
        if (once - again).abs().max() > PROBE_TOLERANCE:
            raise ValueError(
                "encoder: two embeddings of one item differ: is its model in training mode?"
            )
        probe.append(once[0].tolist() if once.isfinite().all() else None)
    name = getattr(encoder, "__qualname__", type(encoder).__qualname__)
    fingerprint = str(getattr(encoder, "fingerprint", ""))
    if not fingerprint and not any(probe):
        raise ValueError(
            "encoder: expected an attribute `fingerprint`, since it embeds none of the items by "
            "which encoders that share a folder are told apart"
        )
    return Identity(name, fingerprint, probe)
