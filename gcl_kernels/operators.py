"""The operators that ``torch.compile`` sees, ``gcl_kernels::neg_lse`` and its backward, and the
``torch.autograd.Function`` of the two passes.

What is static of a call is one argument, the text of a :class:`NegativesSpec`; what a backward pass
needs is a list of tensors with one order, :func:`passes.backward`'s ``saved``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gcl_kernels import passes
from gcl_kernels.backends import reference
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.distributed import empty_agreement
from gcl_kernels.problem import Embedded, Extra, SampleData, empty_gradients, split_data
from gcl_kernels.roads.fused import formed
from gcl_kernels.spec import LossSpec, NegativesSpec, parse_spec, recordable

LIBRARY = torch.library.Library("gcl_kernels", "DEF")
LIBRARY.define(
    "neg_lse(Tensor[] bases, Tensor? mixing, Tensor scale, Tensor?[] data, str spec, "
    "bool[] needs_grad) -> (Tensor neg_lse, Tensor own_logits, Tensor z, Tensor inverse, "
    "Tensor lengths, Tensor coefficients, Tensor dots, Tensor kept, Tensor agreement)"
)
LIBRARY.define(
    "neg_lse_backward(Tensor[] bases, Tensor scale, Tensor?[] data, Tensor[] saved, "
    "Tensor grad_neg_lse, Tensor grad_own_logits, str spec, bool[] needs_grad) -> Tensor[]"
)


def _from_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an operator, which has a spec as text."""

    def parsed(*arguments: Any) -> Any:
        *tensors, text, needs_grad = arguments
        return function(*tensors, parse_spec(text), needs_grad)

    return parsed


def _forward_fake(
    bases: Sequence[Tensor],
    mixing: Tensor | None,
    scale: Tensor,
    data: passes.Data,
    spec: NegativesSpec,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    num_views, num_samples = len(spec.candidates), bases[0].shape[0]
    embedded = Embedded.empty(bases, scale, spec)
    kept = passes.make_road(spec, needs_grad, embedded, split_data(data)[0]).empty_kept(scale)
    return (
        scale.new_empty(num_views, num_samples),
        scale.new_empty(num_views, num_views, num_samples),
        *embedded,
        kept,
        empty_agreement(scale, spec.group),
    )


def _backward_fake(bases: Sequence[Tensor], scale: Tensor, *rest: Any) -> list[Tensor]:
    data, *_, spec, needs_grad = rest
    mixing = scale.new_empty((len(spec.candidates), 2) if needs_grad[-2] else 0)
    of_extra: list[Tensor] = []
    if spec.extra_anchors:
        extra = split_data(data)[1].embeddings
        assert extra is not None
        of_extra = empty_gradients([extra], scale, [spec.extra_grad])
    return [*empty_gradients(bases, scale, needs_grad), mixing, scale.new_empty(()), *of_extra]


_NO_SECOND_GRADIENT = "the gradient of the gradient exists with backend='reference' only"


def _refuse(reason: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"gcl_kernels: {reason}")

    return refuse


for _name, _body, _fake, _reason in (
    (
        "neg_lse",
        passes.forward,
        _forward_fake,
        "the gradient belongs to the loss functions; their operators alone, as a program of "
        "torch.export holds them, have none",
    ),
    (
        "neg_lse_backward",
        passes.backward,
        _backward_fake,
        _NO_SECOND_GRADIENT,
    ),
):
    LIBRARY.impl(_name, _from_text(_body), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gcl_kernels::{_name}", _from_text(_fake), lib=LIBRARY)
    # PyTorch would warn, and leave the gradient out.
    torch.library.register_autograd(f"gcl_kernels::{_name}", _refuse(_reason), lib=LIBRARY)


def _call(
    name: str, body: Callable[..., Any], arguments: tuple[Any, ...], spec: Any, needs: list[bool]
) -> Any:
    """``gcl_kernels::name``, or its body where nothing traces, counts or differentiates it.

    The dispatcher's way to a Python operator costs 25 us; a small batch's products take 50.

    Args:
        spec: a :class:`NegativesSpec`, or its text while ``torch.compile`` traces.
    """
    compiling = torch.compiler.is_compiling()
    watched = compiling or torch.is_grad_enabled() or is_in_torch_dispatch_mode()
    if not watched and all(map(_is_plain, arguments)):
        return body(*arguments, spec, needs)
    if not compiling and "torch.utils.flop_counter" in sys.modules:
        import_module("gcl_kernels.flops").inform_counters()
    text = spec if isinstance(spec, str) else spec.text()
    return getattr(torch.ops.gcl_kernels, name)(*arguments, text, needs)


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def _is_plain(argument: Any) -> bool:
    """Whether it is a tensor without a will of its own, or a sequence of such, or None."""
    if isinstance(argument, (list, tuple)):
        return all(type(tensor) in _PLAIN for tensor in argument)
    return type(argument) in _PLAIN


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise NotImplementedError within a transform of ``torch.func`` or with a batch of gradients,
    whose tensors have no memory that a kernel could read, and where a tensor has a tangent."""
    if torch.compiler.is_compiling():
        return
    if (
        torch._C._are_functorch_transforms_active()
        or any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)
        or forward_ad._current_level >= 0
        and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    ):
        raise NotImplementedError(
            "gcl_kernels: torch.func's transforms (grad, vmap, jvp, ...), forward-mode gradients "
            "and batches of upstream gradients (is_grads_batched, vectorize=True) exist with "
            "backend='reference' only"
        )


def _distinct(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A view in place of each tensor that came before: while ``torch.compile`` traces, an
    ``autograd.Function`` takes none twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return [
        tensor.view_as(tensor) if any(tensor is other for other in tensors[:index]) else tensor
        for index, tensor in enumerate(tensors)
    ]


def _needed(bases: Sequence[Tensor], z: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Those that a backward pass reads beside ``z``: none where ``z`` holds them unrounded, whose
    rows then stand for them."""
    if z.dtype == scale.dtype and all(base.dtype == z.dtype for base in bases):
        return ()
    return tuple(map(recordable, bases))


_OF_SAMPLES, _OF_EXTRA = len(SampleData._fields), len(Extra._fields)
_NUM_DATA = _OF_SAMPLES + _OF_EXTRA


class NegLSE(torch.autograd.Function):
    """(spec, needs_grad, *data, mixing, scale, *bases) -> (neg_lse [V, N], own_logits [V, V, N]),
    and of a group agreement [W + 1]."""

    @staticmethod
    def forward(
        ctx: Any, spec: NegativesSpec | str, needs_grad: list[bool], *inputs: Any
    ) -> tuple[Tensor, ...]:
        data, (mixing, scale, *bases) = inputs[:_NUM_DATA], inputs[_NUM_DATA:]
        given = (bases, mixing, scale, data)
        neg_lse, own_logits, *saved = _call("neg_lse", passes.forward, given, spec, needs_grad)
        kept_bases = _needed(bases, saved[0], scale)
        ctx.save_for_backward(*data, scale, *saved, neg_lse, *kept_bases)
        # As the forward pass was told, whatever is asked for now: its tiles are of these blocks.
        ctx.spec, ctx.needs_grad, ctx.num_saved = spec, needs_grad, len(saved) + 1
        # Without a group there is no agreement, and an output costs some microseconds.
        *_, agreement = saved
        return (neg_lse, own_logits, agreement) if len(agreement) else (neg_lse, own_logits)

    @staticmethod
    def backward(
        ctx: Any, grad_neg_lse: Tensor, grad_own_logits: Tensor, *grad_agreement: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_transforms(grad_neg_lse, grad_own_logits)
        # Read once: checkpointing unpacks what is saved no second time.
        tensors = ctx.saved_tensors
        data, (scale, *rest) = tensors[:_NUM_DATA], tensors[_NUM_DATA:]
        # Backends read by address, and saved tensors may come back from a hook in another layout.
        data = [None if of is None else of.contiguous() for of in data]
        saved = [of.contiguous() for of in rest[: ctx.num_saved]]
        bases = rest[ctx.num_saved :] or saved[0].unbind(0)
        given = (bases, scale, data, saved, grad_neg_lse, grad_own_logits)
        found = _call("neg_lse_backward", passes.backward, given, ctx.spec, ctx.needs_grad)
        # Of extra negatives the last, if there are any, and empty if none is needed.
        of_extra = found[len(ctx.needs_grad)] if len(found) > len(ctx.needs_grad) else None
        if of_extra is not None and not of_extra.numel():
            of_extra = None
        *grads, grad_mixing, grad_scale = (
            grad if needs else None for grad, needs in zip(found, ctx.needs_grad, strict=False)
        )
        of_data = (None,) * _OF_SAMPLES + (of_extra,) + (None,) * (_OF_EXTRA - 1)
        return None, None, *of_data, grad_mixing, grad_scale, *grads


def negatives(
    bases: Sequence[Tensor],
    mixing: Tensor | None,
    scale: Tensor,
    data: SampleData,
    extra: Extra,
    spec: NegativesSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``neg_lse`` [V, N]; ``own_logits`` [V, V, N]: ``s <z_a^j, z_b^j>``, ``ABSENT`` where the pair
    was not asked for; and the numbers of samples of all processes [W], None of one alone.

    Args:
        bases: the views, or the two embeddings of which ``mixing`` [V, 2] makes them, in the
            accumulation dtype and with gradient where it is no constant.
    """
    if mixing is not None and not BACKENDS[spec.backend].fuses_scores:
        bases, mixing, spec = formed(bases, mixing, spec), None, spec._replace(mixed=None)
    if spec.backend == "reference":
        return *reference.negatives(bases, scale, data, extra, spec), None
    beyond = extra.embeddings
    inputs = [of for of in (*bases, mixing, scale, beyond) if of is not None]
    refuse_transforms(*inputs)
    recorded = torch.is_grad_enabled()
    if beyond is not None:
        spec = spec._replace(extra_grad=recorded and beyond.requires_grad)
    static = spec.text() if torch.compiler.is_compiling() else spec
    needs_grad = [
        recorded and tensor is not None and tensor.requires_grad
        for tensor in (*bases, mixing, scale)
    ]
    if any(needs_grad) or spec.extra_grad:
        constants = map(recordable, (*data, *extra))
        neg_lse, own_logits, *agreement = NegLSE.apply(
            static, needs_grad, *constants, mixing, scale, *_distinct(bases)
        )
    else:
        # No node of the graph; for Dynamo no Function, to which it gives a context at times only.
        with torch.no_grad():
            given = (bases, mixing, scale, (*data, *extra))
            neg_lse, own_logits, *agreement = _call(
                "neg_lse", passes.forward, given, static, needs_grad
            )
        agreement = agreement[-1:] if spec.group else []
    return neg_lse, own_logits, agreement[0][:-1] if agreement else None


class _Computed(torch.autograd.Function):
    """(results, needs_grad, mixing, scale, *bases) -> a loss, whose gradients were made with it."""

    @staticmethod
    def forward(ctx: Any, results: list[Tensor], needs_grad: list[bool], *inputs: Any) -> Tensor:
        loss, *gradients = results
        ctx.save_for_backward(*gradients)
        ctx.needs_grad = needs_grad
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms(upstream)
        *grads, of_mixing, of_scale = (
            grad * upstream if needs else None
            for grad, needs in zip(ctx.saved_tensors, ctx.needs_grad, strict=True)
        )
        found = (of_mixing, of_scale, *grads)
        if torch.is_grad_enabled():
            found = _First.apply(torch.ones((), requires_grad=True), *found)
        return None, None, *found


class _First(torch.autograd.Function):
    """Gradients that have none themselves, and say so."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads

    backward = staticmethod(_refuse(_NO_SECOND_GRADIENT))


def small_loss(
    bases: Sequence[Tensor],
    mixing: Tensor | None,
    scale: Tensor,
    data: SampleData,
    spec: NegativesSpec,
    terms: LossSpec,
) -> Tensor | None:
    """The loss of a small batch, with gradients that its backend makes in the same call; None where
    it takes the passes: if no gradient is wanted, if something watches, if it has no such call.

    Args:
        terms: the loss, of the reduction ``"mean"`` or ``"sum"``.
    """
    backend, inputs = BACKENDS[spec.backend], (mixing, scale, *bases)
    if (
        not backend.makes_losses
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or not all(map(_is_plain, (*inputs, data)))
    ):
        return None
    needs_grad = [tensor is not None and tensor.requires_grad for tensor in (*bases, mixing, scale)]
    if not any(needs_grad):
        return None
    refuse_transforms(*(tensor for tensor in inputs if tensor is not None))
    with torch.no_grad():
        results = backend.loss(bases, mixing, scale, data, spec, terms, needs_grad)
    return None if results is None else _Computed.apply(results, needs_grad, *inputs)
