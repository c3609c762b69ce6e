"""Many processes: what those that share a batch tell each other, and in which order.

Process ``r`` of ``W`` holds ``N_r`` samples. Logits between samples of two processes are symmetric
like those within one, and each is multiplied once in the whole group: ``r`` meets the processes
``r - 1, ..., r - W // 2`` (modulo ``W``), as rows against their columns, and gives back what their
rows get of it:

- forward, embeddings travel one way and parts of ``neg_lse``, one number a row, the other;
- backward, embeddings travel again with ``neg_lse`` and its gradient, and parts of the embeddings'
  gradient come back, which their owner adds up in a fixed order.

Where ``W`` is even, two opposite processes meet each other: each multiplies one half of the
rectangle. So all do the same work, ``1 / W`` of what one would do with the whole batch, and every
gradient is complete where its embedding lies.

Shards come all at once (``"gather"``: memory for all embeddings, and half of their gradients) or
one after the other around a ring (``"ring"``: for a few shards, whatever ``W``; the next one is on
its way while one is used).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gcl_kernels.blocks import Samples
from gcl_kernels.spec import BoolTable, check_choice

EXCHANGES = ("gather", "ring")

WITHOUT_GROUP = ""
"""The group's name where there is no other process: operators take strings."""


def resolve_group(group: Any, exchange: str, backend: str) -> str:
    """The name of a process group, ``WITHOUT_GROUP`` for None and for a group of one.

    Raises:
        TypeError, ValueError: ``group`` is no process group, or this process is not in it; an
            unknown ``exchange``.
        RuntimeError: the backend is dense and knows one process only.
    """
    check_choice("exchange", exchange, EXCHANGES)
    if group is None:
        return WITHOUT_GROUP
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not a member of it")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group: expected a torch.distributed process group (torch.distributed.group.WORLD for "
            f"all processes) or None, got {type(group).__name__}"
        )
    if group.size() == 1:
        return WITHOUT_GROUP
    if backend == "reference":
        raise RuntimeError("backend: 'reference' is for one process, got a group of several")
    return group.group_name


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


def empty_sizes(name: str = WITHOUT_GROUP) -> Tensor:
    """Memory for the numbers of samples of a group's processes; of none where there is no other."""
    world = _group(name).size() if name else 0
    return torch.empty(world, dtype=torch.int64, device="cpu")


def _all_gather(everyone: Tensor, own: Tensor, group: Any, async_op: bool) -> Any:
    # Newer versions of PyTorch have it under another name, and warn of the old one.
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(everyone, own, group=group, async_op=async_op)


@dataclass(frozen=True)
class Terms:
    """What the calls of all processes must have in common; named as users know it."""

    embeddings: str
    views: int
    dimension: int
    compute_dtype: torch.dtype
    candidates: BoolTable
    normalize: bool
    sample_ids: bool
    gradients: tuple[bool, ...]
    exchange: str


def agree(name: str, terms: Terms, num_samples: int, scale: Tensor) -> Tensor:
    """``N_r`` of every process of the group, int64 [W] on the CPU.

    One small all-gather, which the host waits for: a difference found here is an error in every
    process, where the transfers that follow would hang or mix up memory.

    Raises:
        ValueError: the processes' terms or scales differ.
        RuntimeError: a CUDA graph is being captured.
    """
    if scale.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "group: many processes compare the shapes of their inputs on the host, which a CUDA "
            "graph cannot capture"
        )
    group = _group(name)
    values = {field.name: getattr(terms, field.name) for field in fields(terms)}
    mine = [num_samples, *(zlib.crc32(repr(value).encode()) for value in values.values())]
    bits = scale.detach().to(torch.float32).view(torch.int32).to(torch.int64).view(1)
    mine_and_scale = torch.cat([torch.tensor(mine, device=scale.device), bits])
    everyone = mine_and_scale.new_empty(group.size() * len(mine_and_scale))
    _all_gather(everyone, mine_and_scale, group, async_op=False)
    sizes, *same = everyone.view(group.size(), -1).cpu().unbind(1)
    differs = {
        what: column != column[group.rank()] for what, column in zip(values, same, strict=False)
    }
    scales = same[-1].to(torch.int32).view(torch.float32)
    own_scale = scales[group.rank()]
    # The last bit of an exponential may be another on another chip.
    differs["logit_scale"] = ~scales.isclose(own_scale, rtol=1e-5, atol=0, equal_nan=True)
    for what, elsewhere in differs.items():
        ranks = elsewhere.nonzero().flatten().tolist()
        if ranks:
            raise ValueError(
                f"group: expected the same {what} in all processes; rank {group.rank()} has "
                f"{values.get(what, own_scale.item())!r}, ranks {ranks} have another"
            )
    return sizes.clone()


@dataclass(frozen=True)
class PerSample:
    """A contiguous tensor with one entry for each sample along ``dim``."""

    tensor: Tensor
    dim: int

    def shape_of(self, num_samples: int) -> list[int]:
        """The shape of as many samples."""
        shape = list(self.tensor.shape)
        shape[self.dim] = num_samples
        return shape


@dataclass(frozen=True)
class Meeting:
    """Own rows and others' columns that this process multiplies.

    Attributes:
        ranks: whose columns they are, in this order.
        rows, cols: the samples of either side that meet.
    """

    ranks: tuple[int, ...]
    rows: Samples
    cols: Samples


def meetings(rank: int, sizes: Sequence[int]) -> list[Meeting]:
    """Whom a process meets, by distance: of all processes' meetings each pair of samples of two
    processes is in one. Where ``W`` is even the last is half of one."""
    world = len(sizes)
    found = []
    for distance in range(1, world // 2 + 1):
        other = (rank - distance) % world
        rows, cols = Samples(0, sizes[rank], sizes[rank]), Samples(0, sizes[other], sizes[other])
        if 2 * distance == world and rank < other:
            cols = Samples(0, (cols.total + 1) // 2, cols.total)
        elif 2 * distance == world:
            rows = Samples((rows.total + 1) // 2, rows.total, rows.total)
        found.append(Meeting((other,), rows, cols))
    return found


class Exchange:
    """The transfers of one pass. The first starts with the construction.

    Args:
        name: of the group.
        exchange: one of ``EXCHANGES``.
        sizes: ``N_r``, from :func:`agree`.
        own: what this process gives.
    """

    def __init__(self, name: str, exchange: str, sizes: Tensor, own: Sequence[PerSample]) -> None:
        self._group, self._sizes, self._own = _group(name), sizes.tolist(), own
        self._rank: int = self._group.rank()
        self._returning: list[tuple[list[list[Tensor]], list[Any], list[Any]]] = []
        start = {"gather": self._start_gather, "ring": self._start_ring}[exchange]
        self._shards = start(meetings(self._rank, self._sizes))

    def meet(
        self, compute: Callable[[Meeting, list[Tensor]], list[PerSample]]
    ) -> Iterator[list[Tensor]]:
        """Go through the meetings, and yield what those return who met this process's rows.

        Args:
            compute: takes a meeting and what its ranks gave, along the same dimensions as one's
                own; returns what their samples get of it.
        """
        for meeting, given in self._shards:
            parts = compute(meeting, given)
            # They had the time of this meeting to come back.
            yield from self._returned()
            self._give_back(meeting, parts)
        yield from self._returned()

    def _send_and_receive(
        self, tag: int, sent: Tensor, to: int, received: Tensor, source: int
    ) -> list[Any]:
        return [
            dist.P2POp(dist.isend, sent, group=self._group, tag=tag, group_peer=to),
            dist.P2POp(dist.irecv, received, group=self._group, tag=tag, group_peer=source),
        ]

    def _give_back(self, meeting: Meeting, parts: Sequence[PerSample]) -> None:
        world, lengths = len(self._sizes), [self._sizes[rank] for rank in meeting.ranks]
        splits = [part.tensor.split(lengths, part.dim) for part in parts]
        coming, calls = [], []
        for k, rank in enumerate(meeting.ranks):
            opposite = (2 * self._rank - rank) % world  # it meets this process's rows
            received = []
            for tag, (part, split) in enumerate(zip(parts, splits, strict=True), len(self._own)):
                own = part.tensor.new_empty(part.shape_of(self._sizes[self._rank]))
                calls += self._send_and_receive(tag, split[k].contiguous(), rank, own, opposite)
                received.append(own)
            coming.append(received)
        self._returning.append((coming, calls, dist.batch_isend_irecv(calls)))

    def _returned(self) -> Iterator[list[Tensor]]:
        for coming, _, requests in self._returning:
            for request in requests:
                request.wait()
            yield from coming
        self._returning.clear()

    def _start_gather(self, pairs: Sequence[Meeting]) -> Iterator[tuple[Meeting, list[Tensor]]]:
        # A collective wants equal lengths: shorter shards are padded.
        gathered, requests = [], []
        for part in self._own:
            flat = part.tensor.reshape(-1)
            most = flat.numel() // self._sizes[self._rank] * max(self._sizes)
            if flat.numel() < most:
                flat = torch.cat([flat, flat.new_zeros(most - flat.numel())])
            everyone = flat.new_empty(len(self._sizes), most)
            requests.append(_all_gather(everyone.view(-1), flat, self._group, async_op=True))
            gathered.append((everyone, flat))

        def shard(part: PerSample, everyone: Tensor, rank: int) -> Tensor:
            num_samples = self._sizes[rank]
            length = everyone.shape[1] // max(self._sizes) * num_samples
            return everyone[rank, :length].view(part.shape_of(num_samples))

        def pieces() -> Iterator[tuple[Meeting, list[Tensor]]]:
            for request in requests:
                request.wait()
            # Whole shards in one piece: few and large blocks.
            whole = len(self._sizes) - 1 - len(pairs)
            for together in (pairs[:whole], pairs[whole:]):
                if not together:
                    continue
                ranks = tuple(rank for pair in together for rank in pair.ranks)
                given = []
                for part, (everyone, _) in zip(self._own, gathered, strict=True):
                    shards = [shard(part, everyone, rank) for rank in ranks]
                    given.append(torch.cat(shards, part.dim) if len(shards) > 1 else shards[0])
                cols = together[0].cols
                if len(together) > 1:
                    total = sum(pair.cols.total for pair in together)
                    cols = Samples(0, total, total)
                yield Meeting(ranks, together[0].rows, cols), given

        return pieces()

    def _start_ring(self, pairs: Sequence[Meeting]) -> Iterator[tuple[Meeting, list[Tensor]]]:
        world = len(self._sizes)

        def start(pair: Meeting, held: list[Tensor]) -> tuple[list[Tensor], list[Any], list[Any]]:
            """Pass ``held`` on, and take what the process before holds."""
            num_samples = self._sizes[pair.ranks[0]]
            coming = [part.tensor.new_empty(part.shape_of(num_samples)) for part in self._own]
            calls = []
            for tag, (sent, received) in enumerate(zip(held, coming, strict=True)):
                calls += self._send_and_receive(
                    tag, sent, (self._rank + 1) % world, received, (self._rank - 1) % world
                )
            return coming, calls, dist.batch_isend_irecv(calls)

        first = start(pairs[0], [part.tensor for part in self._own])

        def pieces() -> Iterator[tuple[Meeting, list[Tensor]]]:
            coming, calls, requests = first
            for k, pair in enumerate(pairs):
                for request in requests:
                    request.wait()
                held = coming
                if k + 1 < len(pairs):
                    coming, calls, requests = start(pairs[k + 1], held)
                yield pair, held

        return pieces()
