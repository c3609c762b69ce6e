"""Many processes: what those that share a batch tell each other, and in which order.

Process ``r`` of ``W`` holds ``N_r`` samples. Logits between samples of two processes are symmetric
like those within one, and each is multiplied once in the whole group: ``r`` meets the processes
``r - 1, ..., r - W // 2`` (modulo ``W``), as rows against their columns, and gives back what their
rows get of it:

- forward, embeddings travel one way and parts of ``neg_lse``, one number a row, the other;
- backward, embeddings travel again with ``neg_lse`` and its gradient, and parts of the embeddings'
  gradient come back, which their owner adds up in a fixed order. The number of the forward pass
  goes with them: what belongs to another makes NaN.

Where ``W`` is even, two opposite processes meet each other: each multiplies one half of the
rectangle. So all do the same work, ``1 / W`` of what one would do with the whole batch, and every
gradient is complete where its embedding lies.

Shards come all at once (``"gather"``: memory for all embeddings, and half of their gradients) or
one after the other around a ring (``"ring"``: for a few shards, whatever ``W``; the next one is on
its way while one is used).
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from gcl_kernels.blocks import Samples
from gcl_kernels.problem import Problem, SampleData, subtractable
from gcl_kernels.spec import ExchangeName, NegativesSpec, check_choice

WITHOUT_GROUP = ""
"""The group's name where there is no other process: operators take strings."""


def check_group(group: Any, exchange: str) -> None:
    """Raise unless ``group`` may be given to a loss, as far as can be said before a call.

    Raises:
        TypeError, ValueError: ``group`` is neither None, ``"world"`` nor a process group, or this
            process is not in it; an unknown ``exchange``.
    """
    check_choice("exchange", exchange, get_args(ExchangeName))
    if group is None or (isinstance(group, str) and group == "world"):
        return
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not a member of it")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group: expected 'world', a torch.distributed process group (of a DeviceMesh: "
            f"mesh.get_group()) or None, got {group!r}"
        )


def resolve_group(group: Any, exchange: str, backend: str) -> str:
    """``"<processes>:<name>"`` of a process group, ``WITHOUT_GROUP`` for None and for one process.

    The number is for ``torch.compile``, whose caches outlive a job: it is the shape of an
    operator's result, and names are the same in jobs of any size.

    Raises:
        TypeError, ValueError: as from :func:`check_group`.
        RuntimeError: ``"world"`` where ``torch.distributed`` is not initialised; a group of several
            for the dense backend, which knows one process only.
    """
    check_group(group, exchange)
    if group is None:
        return WITHOUT_GROUP
    if isinstance(group, str):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group: 'world' needs torch.distributed, which is not initialised "
                "(torch.distributed.init_process_group)"
            )
        group = dist.group.WORLD
    if group.size() == 1:
        return WITHOUT_GROUP
    if backend == "reference":
        raise RuntimeError("backend: 'reference' is for one process, got a group of several")
    return f"{group.size()}:{group.group_name}"


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name.partition(":")[2])


def mean_of_group(value: Tensor, name: str) -> Tensor:
    """The processes' mean of a 0-d tensor, on its device and without a gradient."""
    collectives = torch.distributed._functional_collectives
    group = _group(name)
    total = collectives.all_reduce(value, "sum", group)
    return collectives.wait_tensor(total) / group.size()


def empty_agreement(like: Tensor, name: str = WITHOUT_GROUP) -> Tensor:
    """Memory of the host for what :func:`agree` returns. Without a group empty, and where ``like``
    is: an operator of which all is on one device stays in one CUDA graph."""
    if name:
        return torch.empty(_group(name).size() + 1, dtype=torch.int64, device="cpu")
    return like.new_empty(0, dtype=torch.int64)


def _all_gather(everyone: Tensor, own: Tensor, group: Any, async_op: bool) -> Any:
    # Newer versions of PyTorch have it under another name, and warn of the old one.
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(everyone, own, group=group, async_op=async_op)


def _host_device(group: Any, device: torch.device) -> torch.device:
    """Where what the host will read is gathered: on a CPU, without waiting for the work of another
    device, if the group can (``"cpu:gloo,cuda:nccl"``, PyTorch's default)."""
    backends = dist.get_backend_config(group)
    if any(of.startswith("cpu:") for of in backends.split(",")):
        return torch.device("cpu")
    if group.rank() == 0:
        _warn_of_waiting(backends)
    return device


@lru_cache  # once
def _warn_of_waiting(backends: str) -> None:
    warnings.warn(
        f"group: {backends!r} has no backend for the CPU, so that the host waits for the device "
        "once in every loss; 'cpu:gloo,cuda:nccl' has, what init_process_group() without a "
        "backend makes",
        stacklevel=2,
    )


_next_number: dict[str, int] = {}
"""By the group's name, of its next forward pass. All processes count the same calls."""


def agree(
    spec: NegativesSpec, problem: Problem, data: SampleData, needs_grad: Sequence[bool]
) -> Tensor:
    """``N_r`` of every process of the group, and the number of this forward pass; int64 [W + 1] on
    the CPU.

    One small all-gather, which the host waits for: a difference found here is an error in every
    process, where the transfers that follow would hang or mix up memory. The scale is compared
    among those who know it on the host.

    Args:
        problem, data: of this process's samples.

    Raises:
        ValueError: the processes' calls differ in what they must have in common.
        RuntimeError: a CUDA graph is being captured, and the group has no backend for the CPU.
    """
    group = _group(spec.group)
    device = _host_device(group, problem.scale.device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "group: processes compare what they were given on the host; in a CUDA graph that needs "
            "a group with a backend for the CPU, such as 'cpu:gloo,cuda:nccl', got "
            f"{dist.get_backend_config(group)!r}"
        )
    *needs_bases, needs_mixing, needs_scale = needs_grad
    num_samples = problem.z_rows.shape[:-1].numel() // len(needs_bases)
    terms = {
        "views": f"{len(spec.candidates)} made of {len(needs_bases)}: {spec.bases}",
        "dimension": problem.z_rows.shape[-1],
        "compute_dtype": spec.compute_dtype,
        "candidates": spec.candidates,
        "normalize": spec.normalize,
        **{name: of is not None for name, of in data._asdict().items()},
        "gradients": f"of embeddings {needs_bases}, of fusion_weights {needs_mixing}, "
        f"of logit_scale {needs_scale}",
        "exchange": spec.exchange,
    }
    checksums = [zlib.crc32(repr(term).encode()) for term in terms.values()]
    known = torch.nan if problem.max_scale is None else problem.max_scale
    if problem.max_scale is not None and math.isnan(problem.max_scale):
        known = torch.inf  # as little a scale, and not taken for an unknown one
    bits = torch.tensor(known, dtype=torch.float32, device="cpu").view(torch.int32).item()
    number = _next_number.get(spec.group, 0)
    mine = torch.tensor([num_samples, *checksums, bits, number], device=device)
    everyone = mine.new_empty(group.size() * len(mine))
    _all_gather(everyone, mine, group, async_op=False)
    sizes, *same, scales, numbers = everyone.view(group.size(), -1).cpu().unbind(1)
    # A process may be new in a group of this name.
    number = int(numbers.amax())
    _next_number[spec.group] = number + 1
    differs = {
        what: column != column[group.rank()] for what, column in zip(terms, same, strict=True)
    }
    scales = scales.to(torch.int32).view(torch.float32)
    # The last bit of an exponential may be another on another chip. All come to one verdict, from
    # the largest and the smallest; unknown ones are NaN.
    spread = scales.nan_to_num(-torch.inf).amax() - scales.nan_to_num(torch.inf).amin()
    if spread > 1e-5 * scales.nan_to_num(0).abs().amax():
        differs["logit_scale"] = scales != scales[group.rank()]
    for what, elsewhere in differs.items():
        ranks = elsewhere.nonzero().flatten().tolist()
        if ranks:
            raise ValueError(
                f"group: expected the same {what} in all processes; rank {group.rank()} has "
                f"{terms.get(what, problem.max_scale)!r}, ranks {ranks} have another"
            )
    return torch.cat([sizes, numbers.new_tensor([number])])


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


_FIRST_TAG = 0x6C6B
"""Of the messages of an exchange: gloo tells them by it from a trainer's own."""


class _Transfer:
    """Messages on their way between two processes each, and the tensors that they read and write.

    Args:
        messages: what is sent, to whom, into what is received, from whom; by rank.
    """

    def __init__(self, group: Any, messages: Sequence[tuple[Tensor, int, Tensor, int]]) -> None:
        self._messages, calls = messages, []
        for tag, (sent, to, received, source) in enumerate(messages, _FIRST_TAG):
            calls += [
                dist.P2POp(dist.isend, sent, group=group, tag=tag, group_peer=to),
                dist.P2POp(dist.irecv, received, group=group, tag=tag, group_peer=source),
            ]
        self._requests = dist.batch_isend_irecv(calls)

    def wait(self) -> list[Tensor]:
        """What was received, in order. The transfer lets go of all tensors."""
        for request in self._requests:
            request.wait()
        received = [message[2] for message in self._messages]
        self._messages, self._requests = [], []
        return received


class Exchange:
    """The transfers of one pass. The first starts with the construction.

    Args:
        name: of the group.
        exchange: a ``spec.ExchangeName``.
        agreement: from :func:`agree`.
        own: what this process gives.
    """

    def __init__(
        self, name: str, exchange: str, agreement: Tensor, own: Sequence[PerSample]
    ) -> None:
        self._group, self._sizes, self._own = _group(name), agreement[:-1].tolist(), own
        self._rank: int = self._group.rank()
        self._returning: _Transfer | None = None
        self._num_parts = 0
        start = {"gather": self._start_gather, "ring": self._start_ring}[exchange]
        self._shards = start(meetings(self._rank, self._sizes))

    def meet(
        self, compute: Callable[[Meeting, list[Tensor]], list[PerSample]]
    ) -> Iterator[list[Tensor]]:
        """Go through the meetings, and yield what those return who met this process's rows.

        Args:
            compute: takes a meeting and what its ranks gave, along the same dimensions as one's
                own; returns what their samples get of it, which may be nothing.
        """
        # No name here may keep a shard longer than it is used: they are what takes memory.
        for meeting, given in self._shards:
            parts = compute(meeting, given)
            del given
            # They had the time of this meeting to come back.
            yield from self._returned()
            self._give_back(meeting, parts)
            del parts
        yield from self._returned()

    def _give_back(self, meeting: Meeting, parts: Sequence[PerSample]) -> None:
        if not parts:
            return
        world, lengths = len(self._sizes), [self._sizes[rank] for rank in meeting.ranks]
        splits = [part.tensor.split(lengths, part.dim) for part in parts]
        messages = []
        for k, rank in enumerate(meeting.ranks):
            opposite = (2 * self._rank - rank) % world  # it meets this process's rows
            for part, split in zip(parts, splits, strict=True):
                own = part.tensor.new_empty(part.shape_of(self._sizes[self._rank]))
                messages.append((split[k].contiguous(), rank, own, opposite))
        self._returning = _Transfer(self._group, messages)
        self._num_parts = len(parts)

    def _returned(self) -> Iterator[list[Tensor]]:
        if self._returning is None:
            return
        tensors, self._returning = self._returning.wait(), None
        while tensors:
            yield [tensors.pop(0) for _ in range(self._num_parts)]

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
                del given

        return pieces()

    def _start_ring(self, pairs: Sequence[Meeting]) -> Iterator[tuple[Meeting, list[Tensor]]]:
        after, before = ((self._rank + step) % len(self._sizes) for step in (1, -1))

        def start(pair: Meeting, held: list[Tensor]) -> _Transfer:
            """Pass ``held`` on, and take what the process before holds."""
            num_samples = self._sizes[pair.ranks[0]]
            return _Transfer(
                self._group,
                [
                    (sent, after, sent.new_empty(part.shape_of(num_samples)), before)
                    for part, sent in zip(self._own, held, strict=True)
                ],
            )

        def pieces(transfer: _Transfer) -> Iterator[tuple[Meeting, list[Tensor]]]:
            for k, pair in enumerate(pairs):
                held = transfer.wait()
                if k + 1 < len(pairs):
                    transfer = start(pairs[k + 1], held)
                yield pair, held

        return pieces(start(pairs[0], [part.tensor for part in self._own]))


def lines_for_others(neg_lse: Tensor, grad: Tensor, agreement: Tensor) -> Tensor:
    """What others need of each row in the backward pass, [3, V, N]: ``neg_lse``,
    :func:`subtractable`, its gradient, and of which forward pass they are."""
    number = int(agreement[-1]) % 2**24  # exact in float32
    return torch.stack([subtractable(neg_lse), grad, torch.full_like(grad, number)])


def lines_that_meet(
    own: Tensor, others: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``neg_lse`` of rows and columns, and their gradients, from :func:`lines_for_others`.

    Gradients are NaN if they are not all of one forward pass: other processes go backward in
    another order, and their embeddings are of another loss. On the host that would be an error,
    for which it would have to wait for the device.
    """
    same = (others[2] == own[2].flatten()[0]).all()
    rows, cols = (torch.where(same, lines[1], torch.nan) for lines in (own, others))
    return (own[0], others[0]), (rows, cols)
