"""What is computed: one frozen :class:`LossSpec`, and every argument check but those of process
groups (``distributed``).

Kernels and backends trust a spec; nothing below this module validates again. All checks look at
types, shapes, dtypes and devices only, never at tensor values, so that they neither synchronise a
device nor break a ``torch.compile`` graph.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:  # a PyTorch built without it has none
    ProcessGroup = getattr(torch.distributed, "ProcessGroup", Any)

DEFAULT_TEMPERATURE = 0.07
"""CLIP's initial temperature (Radford et al. 2021), used when neither scale argument is given."""

NORM_EPS = 1e-12
"""``z = e / max(|e|, NORM_EPS)``: the constant of ``torch.nn.functional.normalize``."""

ABSENT = -1e38
"""The own-sample logit of a pair that was not asked for: exp is zero, and unlike -inf it may be
multiplied by a zero weight and leaves every logsumexp a finite term."""

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)

BoolTable = tuple[tuple[bool, ...], ...]
FloatTable = tuple[tuple[float, ...], ...]
Pairs = tuple[tuple[int, int], ...]
Bases = tuple[int | None, ...]


class Array(Protocol):
    """A NumPy array or a tensor."""

    def tolist(self) -> Any: ...


# What users give.
Table = Sequence[Sequence[float]] | Array
Group = ProcessGroup | Literal["world"] | None
SelfSimilarity = Literal["mask", "keep"]
OtherPositives = Literal["compete", "exclude"]
Reduction = Literal["mean", "sum", "none", "pairs"]
SameId = Literal["ignore", "positive"]
BackendName = Literal["auto", "reference", "tiled", "cpu", "triton", "cuda"]
ExchangeName = Literal["gather", "ring"]


def accum_dtype_of(compute_dtype: torch.dtype) -> torch.dtype:
    """float64 where the products are float64, else float32."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


class NegativesSpec(NamedTuple):
    """All that is static of a call. ``text`` is its form as an operator's argument.

    Attributes:
        candidates: ``candidates[a][m]`` says whether anchors of view ``a`` meet the other samples
            of view ``m``. Rows of views that anchor nothing are all false.
        own_pairs: the pairs of views ``(a, b)``, ``a <= b``, whose own-sample logits are needed.
        mixed: None where the views are given. Else they are made of two bases (score fusion): for
            each view the base that it is, or None for a combination.
        normalize: divide every embedding by its length first.
        compute_dtype: dtype of the operands of the matrix products.
        max_scale: the logit scale where it is a Python number, else None. It lets a backend prove
            a bound on the logits without reading a tensor.
        backend: a name of ``dispatch.BACKENDS``, already resolved.
        group: the name of the process group whose embeddings meet, empty for this process alone.
        exchange: how shards travel, an ``ExchangeName``.
        extra_anchors: for each view, whether its anchors meet the extra negatives; empty without.
        extra_grad: whether extra negatives get a gradient.
    """

    candidates: BoolTable
    own_pairs: Pairs
    mixed: Bases | None
    normalize: bool
    compute_dtype: torch.dtype
    max_scale: float | None
    backend: str
    group: str = ""
    exchange: str = "gather"
    extra_anchors: tuple[bool, ...] = ()
    extra_grad: bool = False

    @property
    def accum_dtype(self) -> torch.dtype:
        """Of norms, logits, statistics and gradient accumulators."""
        return accum_dtype_of(self.compute_dtype)

    @property
    def bases(self) -> Bases:
        """For each view the base that it is, or None for a combination of the two bases."""
        return tuple(range(len(self.candidates))) if self.mixed is None else self.mixed

    @property
    def base_pairs(self) -> Pairs:
        """The pairs of bases whose own-sample similarities are needed."""
        return self.own_pairs if self.mixed is None else ((0, 0), (0, 1), (1, 1))

    @property
    def pairs_itself(self) -> bool:
        """Whether some view is paired with itself."""
        return any(a == b for a, b in self.own_pairs)

    def text(self) -> str:
        return repr(tuple(str(of) if isinstance(of, torch.dtype) else of for of in self))


@lru_cache(maxsize=256)
def parse_spec(text: str) -> NegativesSpec:
    """What :meth:`NegativesSpec.text` was made of."""
    spec = NegativesSpec(*ast.literal_eval(text))
    name = str(spec.compute_dtype).removeprefix("torch.")
    return spec._replace(compute_dtype=getattr(torch, name))


@dataclass(frozen=True)
class LossSpec:
    """A contrastive loss over ``V`` views: which pairs count, and what competes with them.

    Attributes:
        candidates: V x V, see :class:`NegativesSpec`.
        pair_weights: V x V, non-negative, zero diagonal, summing to 1; ``[a][b]`` weighs the term
            in which anchor view ``a`` has to find view ``b`` of its own sample.
        self_similarity: ``"mask"`` or ``"keep"`` the anchor itself in its denominator.
        other_positives: ``"compete"`` keeps the other views of the anchor's sample in every
            denominator of the row, ``"exclude"`` leaves them out.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"pairs"``.
        own_pairs: unordered view pairs ``(a, b)``, ``a <= b``, whose own-sample similarity is
            needed.
        same_id: samples of an equal id are ``"ignore"``d, or ``"positive"`` for each other.
        false_negative_margin: above the anchor's largest positive by so much, as a similarity,
            another sample is no negative; None: it always is one.
    """

    candidates: BoolTable
    pair_weights: FloatTable
    self_similarity: str
    other_positives: str
    reduction: str
    own_pairs: Pairs
    same_id: str = "ignore"
    false_negative_margin: float | None = None

    @property
    def num_views(self) -> int:
        return len(self.candidates)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def is_dtensor(value: Any) -> bool:
    """Whether it is one, by name: its module is not imported for it."""
    return type(value).__name__ == "DTensor"


def refuse_dtensor(name: str, value: Any) -> None:
    """Raise TypeError if it is one: an operator would meet it beside plain tensors."""
    if is_dtensor(value):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass .to_local() or "
            ".full_tensor(), whichever the loss should see"
        )


def check_views(views: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise unless all views are [N, D] floating tensors of one shape on one device, N, D >= 1."""
    for view, name in zip(views, names, strict=True):
        refuse_dtensor(name, view)
        if not isinstance(view, Tensor):
            raise TypeError(f"{name}: expected a tensor of shape [N, D], got {type(view).__name__}")
        if view.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {view.layout}")
        if view.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: expected dtype float64, float32, bfloat16 or float16, got {view.dtype}"
            )
        if view.dim() != 2:
            raise ValueError(
                f"{name}: expected a 2-D tensor [N, D], got {view.dim()}-D shape {_shape(view)}"
            )
        if view.shape[0] == 0 or view.shape[1] == 0:
            raise ValueError(f"{name}: expected N >= 1 and D >= 1, got shape {_shape(view)}")
    first = views[0]
    for view, name in zip(views[1:], names[1:], strict=True):
        if view.shape[0] != first.shape[0] or view.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}: expected shape {_shape(first)} like {names[0]}, got {_shape(view)}"
            )
        if view.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device} like {names[0]}, got {view.device}"
            )


def view_list(views: Any) -> list[Any]:
    """``views`` as a list: a sequence of tensors, or what yields them."""
    if not isinstance(views, Iterable):
        raise TypeError(f"views: expected a sequence of tensors [N, D], got {type(views).__name__}")
    return list(views)


def resolve_sample_ids(
    sample_ids: Tensor | None, like: Tensor, name: str = "sample_ids"
) -> Tensor | None:
    """``sample_ids`` as int64; raises unless it is None or N integers on the embeddings' device."""
    if sample_ids is None:
        return None
    if not isinstance(sample_ids, Tensor):
        raise TypeError(
            f"{name}: expected an integer tensor of shape [N], got {type(sample_ids).__name__}"
        )
    if sample_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(
            f"{name}: expected dtype int64, int32, int16, int8 or uint8, got {sample_ids.dtype}"
        )
    if sample_ids.dim() != 1 or sample_ids.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: expected shape [{like.shape[0]}], got {_shape(sample_ids)}")
    if sample_ids.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {sample_ids.device}")
    return sample_ids.to(torch.int64).contiguous()


def _values_are_read(tensor: Tensor) -> bool:
    """Whether values may be checked: where that neither waits for a device nor breaks a graph."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def _table_of_samples(name: str, value: Any, num_views: int, like: Tensor) -> Tensor:
    """``value`` as a tensor [V, N] of constants; raises unless it is one."""
    refuse_dtensor(name, value)
    shape = [num_views, like.shape[0]]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {type(value).__name__}")
    if list(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {_shape(value)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name}: expected constants, got a tensor that requires a gradient")
    return value


def resolve_present(present: Any, num_views: int, like: Tensor) -> Tensor | None:
    """``present`` as booleans [V, N] of the given views.

    Raises:
        TypeError, ValueError: not None, nor booleans [V, N], nor V masks [N] of which some may be
            None; on a CPU, if nothing is there at all.
    """
    if present is None:
        return None
    if isinstance(present, (list, tuple)):
        for v, mask in enumerate(present):
            if mask is not None and not isinstance(mask, Tensor):
                raise TypeError(
                    f"present[{v}]: expected booleans [N] or None, got {type(mask).__name__}"
                )
        everywhere = torch.ones(like.shape[0], dtype=torch.bool, device=like.device)
        masks = [everywhere if mask is None else mask for mask in present]
        if len(masks) != num_views or any(mask.shape != everywhere.shape for mask in masks):
            raise ValueError(
                f"present: expected {num_views} masks of shape {_shape(everywhere)}, got "
                f"{[_shape(mask) for mask in masks]}"
            )
        present = torch.stack(masks)
    present = _table_of_samples("present", present, num_views, like)
    if present.dtype != torch.bool:
        raise TypeError(f"present: expected dtype bool, got {present.dtype}")
    if _values_are_read(present) and not present.any():
        raise ValueError("present: expected at least one embedding to be there, got none")
    return present


def resolve_candidate_weights(
    weights: Any, num_views: int, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The logarithms of ``candidate_weights`` [V, N] in this dtype.

    Raises:
        TypeError, ValueError: neither None nor floating [V, N]; on a CPU, negative or not finite.
    """
    if weights is None:
        return None
    weights = _table_of_samples("candidate_weights", weights, num_views, like)
    if not weights.dtype.is_floating_point:
        raise TypeError(f"candidate_weights: expected a floating dtype, got {weights.dtype}")
    if _values_are_read(weights) and not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("candidate_weights: expected finite numbers >= 0, got others")
    return weights.to(dtype).log()


def resolve_extra(
    embeddings: Any, ids: Any, anchors: Any, num_views: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None, tuple[bool, ...]]:
    """Extra negatives [K, D], their ids [K] and, for each view, whether its anchors meet them.

    Raises:
        TypeError, ValueError: malformed, or ids or anchors without extra negatives.
    """
    if embeddings is None:
        for name, value in (("extra_ids", ids), ("extra_anchors", anchors)):
            if value is not None:
                raise ValueError(f"{name}: expected extra_negatives with it, got None")
        return None, None, ()
    name = "extra_negatives"
    refuse_dtensor(name, embeddings)
    if not isinstance(embeddings, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of shape [K, D], got {type(embeddings).__name__}"
        )
    if embeddings.dtype not in FLOAT_DTYPES or embeddings.layout != torch.strided:
        raise TypeError(
            f"{name}: expected dtype float64, float32, bfloat16 or float16, dense, got "
            f"{embeddings.dtype}, layout {embeddings.layout}"
        )
    if embeddings.dim() != 2 or embeddings.shape[1] != like.shape[1] or not len(embeddings):
        raise ValueError(
            f"{name}: expected shape [K, {like.shape[1]}], K >= 1, got {_shape(embeddings)}"
        )
    if embeddings.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {embeddings.device}")
    anchors = check_anchors(anchors, num_views) or (True,) * num_views
    return embeddings, resolve_sample_ids(ids, embeddings, "extra_ids"), anchors


def check_anchors(anchors: Any, num_views: int) -> tuple[bool, ...] | None:
    """``extra_anchors`` as V booleans, of which one is true; raises unless it is such or None."""
    if anchors is None:
        return None
    given = anchors.tolist() if hasattr(anchors, "tolist") else anchors
    given = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if len(given) != num_views or not all(isinstance(meets, bool) for meets in given):
        raise ValueError(f"extra_anchors: expected {num_views} booleans, got {anchors!r}")
    if not any(given):
        raise ValueError("extra_anchors: expected at least one true entry, got none")
    return given


def check_margin(margin: Any) -> float:
    """``false_negative_margin`` as a float; raises unless it is a finite number >= 0."""
    margin = plain_number(margin)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(
            f"false_negative_margin: expected a number or None, got {type(margin).__name__}"
        )
    if not 0 <= margin < math.inf:
        raise ValueError(f"false_negative_margin: expected a finite number >= 0, got {margin}")
    return float(margin)


def check_scalar_tensor(name: str, value: Any, device: torch.device | None) -> None:
    """Raise if it is a tensor, and not a floating one of shape [] or [1] on this device (None: any
    device)."""
    refuse_dtensor(name, value)
    if not isinstance(value, Tensor):
        return
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating tensor, got {value.dtype}")
    if value.numel() != 1 or value.dim() > 1:
        raise ValueError(f"{name}: expected shape [] or [1], got {_shape(value)}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{name}: expected device {device} like the embeddings, got {value.device}"
        )


def resolve_scale(
    logit_scale: float | Tensor | None,
    temperature: float | Tensor | None,
    device: torch.device,
    accum_dtype: torch.dtype,
) -> tuple[Tensor, float | None]:
    """The logit scale as a 0-d tensor in ``accum_dtype``, and its value where a number was given.

    Raises:
        ValueError: both arguments given; a number that is not finite and positive; a tensor with
            more than one element or on another device.
        TypeError: neither a number nor a floating tensor.
    """
    if logit_scale is not None and temperature is not None:
        raise ValueError(
            "logit_scale, temperature: expected at most one of them (logit_scale = 1 / "
            "temperature), got both"
        )
    name = "logit_scale" if logit_scale is not None else "temperature"
    value = logit_scale if logit_scale is not None else temperature
    if value is None:
        value = DEFAULT_TEMPERATURE
    check_scalar_tensor(name, value, device)
    if isinstance(value, Tensor):
        value = recordable(value)
        # A [] tensor as it is: reshaping it would add a node to the graph.
        scale = (value.reshape(()) if value.dim() else value).to(accum_dtype)
        return (scale if name == "logit_scale" else scale.reciprocal()), None
    number = check_positive(name, value, "a number or a tensor", accum_dtype)
    if name == "temperature":
        number = 1.0 / number
    if torch.compiler.is_compiling():
        # As an operand: a constant of the graph would be compiled anew for each step's value.
        return torch.ones((), dtype=accum_dtype, device=device) * number, None
    return torch.full((), number, dtype=accum_dtype, device=device), number


def warn_of_temperature(number: float | None, normalize: bool) -> None:
    """Warn where a scale given as a number (None: it was not) looks like a temperature."""
    if normalize and number is not None and number < 1:
        # One text whatever the number: Python then shows it once, not at each step.
        warnings.warn(
            "logit_scale: a number below 1 (a temperature above 1) leaves the softmax over cosine "
            "similarities nearly uniform; logit_scale is 1 / temperature: for a temperature pass "
            "temperature=...",
            stacklevel=2,
        )


def plain_number(value: Any) -> Any:
    """A NumPy scalar or an array without dimensions as Python's number, anything else as it is."""
    if not isinstance(value, (int, float, Tensor)) and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def recordable(value: Any) -> Any:
    """A copy of a tensor that ``torch.inference_mode`` made, which no backward pass may keep;
    anything else as it is."""
    if isinstance(value, Tensor) and not torch.compiler.is_compiling() and value.is_inference():
        return value.clone()
    return value


def check_positive(
    name: str,
    value: Any,
    expected: str = "a number",
    dtype: torch.dtype = torch.float32,
) -> float:
    """``value`` as a float; raises unless it is a number > 0 that ``dtype`` can hold, as well as
    its inverse."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    largest = torch.finfo(dtype).max
    if not 1 / largest <= value <= largest:
        raise ValueError(f"{name}: expected a number within {dtype}'s range, got {value}")
    return float(value)


def check_compute_dtype(compute_dtype: Any) -> None:
    """Raise unless it is one that products can have."""
    if compute_dtype not in FLOAT_DTYPES:
        raise ValueError(
            "compute_dtype: expected torch.float64, float32, bfloat16 or float16, got "
            f"{compute_dtype!r}"
        )


def check_normalize(normalize: Any) -> None:
    """Raise unless it is a bool."""
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected True or False, got {normalize!r}")


def resolve_compute_dtype(
    compute_dtype: torch.dtype | None,
    views: Sequence[Tensor],
    half_dtypes: Callable[[], Sequence[torch.dtype]] | None = None,
) -> torch.dtype:
    """The argument, else autocast's, else the inputs' dtype.

    Args:
        half_dtypes: asked for the half types that are multiplied as such, where products accumulate
            and return float32, if one is wanted; the others compute in float32. Default: on CUDA
            devices all.
    """
    device_type = views[0].device.type
    if compute_dtype is None:
        compute_dtype = views[0].dtype
        for view in views[1:]:
            compute_dtype = torch.promote_types(compute_dtype, view.dtype)
        has_autocast = device_type != "meta"
        if (
            compute_dtype != torch.float64
            and has_autocast
            and torch.is_autocast_enabled(device_type)
        ):
            compute_dtype = torch.get_autocast_dtype(device_type)
    else:
        check_compute_dtype(compute_dtype)
    if compute_dtype not in HALF_DTYPES:
        return compute_dtype
    if half_dtypes is None:
        served: Sequence[torch.dtype] = HALF_DTYPES if device_type == "cuda" else ()
    else:
        served = half_dtypes()
    return compute_dtype if compute_dtype in served else torch.float32


def check_fusion_weights(
    weights: Any, device: torch.device | None = None
) -> tuple[float | Tensor, float | Tensor]:
    """``weights`` as two Python numbers or tensors; raises unless they are such."""
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise ValueError(f"fusion_weights: expected two numbers or tensors, got {weights!r}")
    alpha, beta = (recordable(plain_number(weight)) for weight in weights)
    for index, weight in enumerate((alpha, beta)):
        name = f"fusion_weights[{index}]"
        check_scalar_tensor(name, weight, device)
        if isinstance(weight, Tensor):
            continue
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(weight).__name__}")
        if not -math.inf < weight < math.inf:
            raise ValueError(f"{name}: expected a finite number, got {weight}")
    return alpha, beta


def _rows(name: str, value: Any, num_views: int, entry: str) -> list[list[Any]]:
    """``value`` as nested lists, V x V."""
    shape = f"{num_views} x {num_views} {entry}"
    if isinstance(value, Tensor) and value.device.type != "cpu":
        # Its values are checked, and reading them from another device would synchronise.
        raise ValueError(f"{name}: expected a table on the CPU, got a tensor on {value.device}")
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name}: expected constants, got a tensor that requires a gradient")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected {shape}, got {type(value).__name__}")
    rows = []
    for row in value:
        row = row.tolist() if hasattr(row, "tolist") else row
        if not isinstance(row, (list, tuple)):
            raise TypeError(f"{name}: expected {shape}, got a row of type {type(row).__name__}")
        rows.append([plain_number(entry) for entry in row])
    if len(rows) != num_views or any(len(row) != num_views for row in rows):
        raise ValueError(
            f"{name}: expected {shape}, got {len(rows)} rows of lengths {[len(r) for r in rows]}"
        )
    return rows


def candidate_table(value: Any, num_views: int) -> BoolTable:
    """``candidates`` as a V x V tuple of booleans; of None all are true."""
    if value is None:
        return ((True,) * num_views,) * num_views
    rows = _rows("candidates", value, num_views, "booleans")
    for a, row in enumerate(rows):
        for m, entry in enumerate(row):
            if not isinstance(entry, (bool, int)) or entry not in (0, 1):
                raise ValueError(f"candidates: expected booleans, got {entry!r} at [{a}][{m}]")
    return tuple(tuple(bool(entry) for entry in row) for row in rows)


def weight_table(name: str, value: Any, num_views: int) -> FloatTable:
    """``pair_weights`` as a V x V tuple of floats that sum to 1."""
    rows = _rows(name, value, num_views, "numbers")
    total = 0.0
    for a, row in enumerate(rows):
        for b, entry in enumerate(row):
            if isinstance(entry, bool) or not isinstance(entry, (int, float)):
                raise TypeError(f"{name}: expected numbers, got {entry!r} at [{a}][{b}]")
            if not 0 <= entry < math.inf:
                raise ValueError(f"{name}: expected finite numbers >= 0, got {entry} at [{a}][{b}]")
            if a == b and entry != 0:
                raise ValueError(f"{name}: expected a zero diagonal, got {entry} at [{a}][{a}]")
            total += entry
    if total == 0:
        raise ValueError(f"{name}: expected at least one positive weight, got all zeros")
    if total == math.inf:
        raise ValueError(f"{name}: expected weights with a finite sum, got {value}")
    return tuple(tuple(entry / total for entry in row) for row in rows)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError naming the valid choices unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _own_pairs(
    candidates: BoolTable, weights: FloatTable, self_similarity: str, other_positives: str
) -> Pairs:
    size = len(candidates)
    pairs = []
    for a in range(size):
        if self_similarity == "keep" and candidates[a][a]:
            pairs.append((a, a))
        for b in range(a + 1, size):
            weighted = weights[a][b] > 0 or weights[b][a] > 0
            competing = other_positives == "compete" and (candidates[a][b] or candidates[b][a])
            if weighted or competing:
                pairs.append((a, b))
    return tuple(pairs)


def make_loss_spec(
    num_views: int,
    pair_weights: Table | None = None,
    candidates: Table | None = None,
    self_similarity: SelfSimilarity = "mask",
    other_positives: OtherPositives = "compete",
    reduction: Reduction = "mean",
    same_id: SameId = "ignore",
    false_negative_margin: float | None = None,
) -> LossSpec:
    """Check a loss's options and put them in normal form.

    Views that anchor no pair get an all-false row of candidates: nothing is computed for them.

    Raises:
        ValueError, TypeError: an option is malformed, or an anchor view has no candidate at all.
    """
    if num_views < 2:
        raise ValueError(f"views: expected at least 2, got {num_views}")
    choices = (self_similarity, other_positives, reduction, same_id)
    margin = None if false_negative_margin is None else check_margin(false_negative_margin)
    # What is no table is checked once for each set of options; Dynamo traces through the cache, and
    # warns.
    if (
        pair_weights is None
        and (candidates is None or candidates is CROSS)
        and all(isinstance(choice, str) for choice in choices)
        and not torch.compiler.is_compiling()
    ):
        return _spec_without_tables(num_views, candidates, *choices, margin)
    return _checked_spec(num_views, pair_weights, candidates, *choices, margin)


CROSS: BoolTable = ((False, True), (True, False))
"""Candidates of two views that meet each other and not themselves: CLIP's."""


def _checked_spec(
    num_views: int,
    pair_weights: Table | None,
    candidates: Table | None,
    self_similarity: SelfSimilarity,
    other_positives: OtherPositives,
    reduction: Reduction,
    same_id: SameId,
    margin: float | None,
) -> LossSpec:
    check_choice("self_similarity", self_similarity, get_args(SelfSimilarity))
    check_choice("other_positives", other_positives, get_args(OtherPositives))
    check_choice("reduction", reduction, get_args(Reduction))
    check_choice("same_id", same_id, get_args(SameId))
    if same_id == "positive":
        _check_positive_ids(other_positives, reduction, margin)
    weights = None
    if pair_weights is not None:
        weights = weight_table("pair_weights", pair_weights, num_views)
    table = candidate_table(candidates, num_views)
    build = _loss_spec if torch.compiler.is_compiling() else _known_loss_spec
    return build(weights, table, self_similarity, other_positives, reduction, same_id, margin)


def _check_positive_ids(other_positives: str, reduction: str, margin: float | None) -> None:
    """Raise where samples of one id are positives and an option has no meaning then."""
    for name, value, allowed in (
        ("other_positives", other_positives, other_positives == "compete"),
        ("reduction", reduction, reduction != "pairs"),
        ("false_negative_margin", margin, margin is None),
    ):
        if not allowed:
            raise ValueError(f"same_id: 'positive' does not go with {name}={value!r}")


@lru_cache(maxsize=256)
def _spec_without_tables(num_views: int, candidates: BoolTable | None, *choices: Any) -> LossSpec:
    return _checked_spec(num_views, None, candidates, *choices)


def _loss_spec(
    weights: FloatTable | None,
    table: BoolTable,
    self_similarity: str,
    other_positives: str,
    reduction: str,
    same_id: str,
    margin: float | None,
) -> LossSpec:
    views = range(len(table))
    if weights is None:
        uniform = 1.0 / (len(table) * (len(table) - 1))
        weights = tuple(tuple(0.0 if a == b else uniform for b in views) for a in views)
    anchors = [any(w > 0 for w in weights[a]) for a in views]
    for a in views:
        if anchors[a] and not any(table[a]):
            raise ValueError(
                f"candidates: expected at least one true entry in row {a}, whose view anchors a "
                f"weighted pair, got {table[a]}"
            )
    used = tuple(tuple(anchors[a] and table[a][m] for m in views) for a in views)
    return LossSpec(
        candidates=used,
        pair_weights=weights,
        self_similarity=self_similarity,
        other_positives=other_positives,
        reduction=reduction,
        own_pairs=_own_pairs(used, weights, self_similarity, other_positives),
        same_id=same_id,
        false_negative_margin=margin,
    )


_known_loss_spec = lru_cache(maxsize=256)(_loss_spec)
