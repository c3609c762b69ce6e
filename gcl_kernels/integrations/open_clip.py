"""open_clip: a loss for its trainers and models that return fused image-text embeddings.

Made for open_clip 3.3.0 (`open_clip_train.main`) and for the `CLIPTask` of its 4.x branch. The
adapter renames arguments and holds no maths: `gcl_kernels.gcl_loss` is the loss.

    import open_clip_train.main as program
    from gcl_kernels.integrations import open_clip as gcl

    program.create_loss = gcl.create_loss
    program.create_model_and_transforms = gcl.create_model_and_transforms   # for exact CLIP-SF
    program.main(["--model", "ViT-B-32", "--train-data", ...])

Two ways to a fused embedding:

- `GCLLoss` on any open_clip model adds what it receives. These features are L2-normalised, so an
  image and a text count equally: `z_it = normalise(alpha z_i + beta z_t)`.
- `FusedCLIP` adds the raw embeddings, as CLIP-SF (UniIR) does: `z_it = normalise(alpha e_i +
  beta e_t)`, in which the longer embedding counts more. It returns `fused_features` for the loss;
  with `fuse_in_loss=True` it hands the loss the raw embeddings instead, and the loss, which then
  knows of what the fused ones are made, takes 4/9 of the work for the same numbers.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gcl_kernels
from gcl_kernels.spec import BackendName, ExchangeName, OtherPositives, SelfSimilarity, Table

try:
    import open_clip
except ModuleNotFoundError as error:
    if error.name != "open_clip":  # open_clip is there, and something that it needs is not
        raise
    raise ImportError(
        "gcl_kernels.integrations.open_clip needs open_clip: pip install open_clip_torch"
    ) from error

__all__ = [
    "FusedCLIP",
    "FusedCustomTextCLIP",
    "GCLLoss",
    "create_loss",
    "create_model_and_transforms",
]


class GCLLoss(nn.Module):
    """`gcl_kernels.gcl_loss` with the constructor and the call of `open_clip.ClipLoss`.

    Args:
        gather_with_grad: true with several processes; with one it changes nothing.
        local_loss, cache_labels, rank: accepted because open_clip passes them. Each process returns
            the loss of its own samples, and its gradients are those of `ClipLoss` with
            `gather_with_grad`, whichever its `local_loss`.
        world_size: number of processes, all of `torch.distributed`'s; they share the batch.
        use_horovod: False.
        exchange: as in `gcl_kernels.gcl_loss`, of several processes.
        pair_weights, candidates, self_similarity, other_positives, fusion_weights, compute_dtype,
            backend: as in `gcl_kernels.gcl_loss`, same defaults. `fusion_weights` serves batches
            without `fused_features`: with a model of `fuse_in_loss=True` give the model's.

    Raises:
        ValueError, TypeError: malformed options, as from `gcl_kernels.GCLLoss`; a `world_size` that
            is not `torch.distributed`'s; several processes without `gather_with_grad`.
        NotImplementedError: `use_horovod`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        pair_weights: Table | None = None,
        candidates: Table | None = None,
        self_similarity: SelfSimilarity = "mask",
        other_positives: OtherPositives = "compete",
        fusion_weights: Sequence[float | Tensor] = (1.0, 1.0),
        compute_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
        exchange: ExchangeName = "gather",
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError("GCLLoss does not support horovod (use_horovod=True)")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        if world_size != processes:
            # open_clip 4.x users construct the loss themselves: a forgotten world_size would
            # silently train every process on its own negatives alone.
            raise ValueError(
                f"world_size: expected {processes}, the processes of torch.distributed"
                f"{'' if distributed else ' (not initialised)'}, got {world_size}"
            )
        if processes > 1 and not gather_with_grad:
            raise ValueError(
                "gather_with_grad: expected True with several processes (--gather-with-grad), got "
                "False: ClipLoss's feature gradients without it lack the other processes' share, "
                "and GCLLoss has no such mode"
            )
        self.loss = gcl_kernels.GCLLoss(
            # Most of open_clip's features are normalised already (those of `fuse_in_loss` are not),
            # and normalising again is O(N D) beside O(N^2 D): it takes out the half types' rounding
            # of the lengths, and what it takes out of the gradient (the part along the feature) the
            # model's normalisation would.
            normalize=True,
            pair_weights=pair_weights,
            candidates=candidates,
            self_similarity=self_similarity,
            other_positives=other_positives,
            fusion_weights=fusion_weights,
            compute_dtype=compute_dtype,
            backend=backend,
            group="world" if processes > 1 else None,
            exchange=exchange,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        fused_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch, a scalar (float32, or float64 for float64 features).

        Args:
            image_features: (N, D), row j the image of sample j; float16, bfloat16, float32 or
                float64, L2-normalised or not.
            text_features: (N, D), the text of the same samples.
            logit_scale: shape [] or [1], already exponentiated.
            logit_bias: shape [] or [1] or None; a constant added to every logit of a softmax
                changes nothing, so it gets a gradient of zero.
            fused_features: (N, D) or None. None: the fused embedding is the sum of the given
                features weighted by `fusion_weights`, at 4/9 of the work. Of raw embeddings, as a
                model of `fuse_in_loss=True` returns them, that is CLIP-SF; of features normalised
                before it is not (see `FusedCLIP`).
            output_dict: return `{"contrastive_loss": loss}`. open_clip 3.3.0 sums every entry, so
                there is one.
        """
        loss = self.loss(image_features, text_features, fused_features, logit_scale)
        if logit_bias is not None:
            # DistributedDataParallel fails on a parameter that takes no part in the loss.
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


def create_loss(args: Any, **options: Any) -> GCLLoss:
    """Stands in for `open_clip.create_loss`: assign it to `open_clip_train.main.create_loss`.

    Logs the options, which are not among the arguments that open_clip logs.

    Args:
        args: the parsed arguments of open_clip's training program.
        options: keyword arguments of `GCLLoss`, bound with `functools.partial`.

    Raises:
        ValueError: `args` ask for a loss of another kind (distillation, CoCa or SigLIP), or for
            several processes without `gather_with_grad`.
        NotImplementedError: horovod.
    """
    for asked, why in (
        (args.distill, "--distill-model"),
        (_is_coca(args.model), f"--model {args.model}, a CoCa,"),
        (args.siglip, "--siglip"),
    ):
        if asked:
            raise ValueError(_OTHER_LOSS.format(why))
    loss = GCLLoss(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        cache_labels=True,
        rank=args.rank,
        world_size=args.world_size,
        use_horovod=getattr(args, "horovod", False),  # 4.x has no such argument
        **options,
    )
    if args.rank == 0:  # as open_clip, which logs once
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        logging.info(f"Created gcl_kernels' GCLLoss: {given or 'default options'}")
    return loss


_OTHER_LOSS = "GCLLoss replaces open_clip's ClipLoss only: {} asks for another loss"


def _is_coca(name: str) -> bool:
    """Whether open_clip makes a CoCa of this name: by its config, a name may be anything."""
    config = open_clip.get_model_config(name)
    if config is None:  # as open_clip's factory reads ViT-B/32
        config = open_clip.get_model_config(name.replace("/", "-"))
    return config is not None and "multimodal_cfg" in config


_Self = TypeVar("_Self", bound="_Fused")


class _Fused(nn.Module):
    """What `FusedCLIP` and `FusedCustomTextCLIP` add to their open_clip class."""

    _extends: ClassVar[type[nn.Module]]
    encode_image: Callable[..., Tensor]
    encode_text: Callable[..., Tensor]
    logit_scale: Tensor
    logit_bias: Tensor | None
    output_dict: bool
    fusion_weights: tuple[float, float]
    fuse_in_loss: bool

    def __init__(
        self,
        *args: Any,
        fusion_weights: Sequence[float] = (1.0, 1.0),
        fuse_in_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.fusion_weights = _checked_fusion_weights(fusion_weights)
        self.fuse_in_loss = fuse_in_loss

    @classmethod
    def from_clip(
        cls: type[_Self],
        model: nn.Module,
        fusion_weights: Sequence[float] = (1.0, 1.0),
        *,
        fuse_in_loss: bool = False,
    ) -> _Self:
        """A fused model on the weights of `model`: shared, not copied; `model` stays as it is.

        Raises:
            TypeError: `model` is not an instance of the open_clip class that `cls` extends
                (a model wrapped by DDP, `torch.compile` or TorchScript is not: convert it before).
        """
        if not isinstance(model, cls._extends):
            raise TypeError(
                f"{cls.__name__}.from_clip: expected an open_clip.{cls._extends.__name__}, "
                f"got {type(model).__name__}"
            )
        fused = cls.__new__(cls)
        # Own containers, shared contents: a submodule replaced on one model stays on the other.
        # `__getstate__` leaves out what `model.compile()` made, which would run model's forward.
        fused.__dict__ = {
            name: copy.copy(value) if isinstance(value, dict | set) else value
            for name, value in model.__getstate__().items()
        }
        fused.fusion_weights = _checked_fusion_weights(fusion_weights)
        fused.fuse_in_loss = fuse_in_loss
        return fused

    def encode_fused(self, image: Tensor, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (N, D) of image-text pairs: `alpha encode_image + beta encode_text`.

        Args:
            image: (N, 3, H, W).
            text: (N, context_length) token ids.
            normalize: L2-normalise the sum.
        """
        image_embeddings = self.encode_image(image)
        fused = self._fuse(image_embeddings, self.encode_text(text))
        if normalize:
            fused = F.normalize(fused, dim=-1)
        return fused.to(image_embeddings.dtype)

    def _fuse(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        # In float32 at least: the sum of half types would be rounded before its length is taken.
        dtype = torch.promote_types(image_embeddings.dtype, torch.float32)
        alpha, beta = self.fusion_weights
        return alpha * image_embeddings.to(dtype) + beta * text_embeddings.to(dtype)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Any:
        """As the open_clip class, and with both inputs and `output_dict` one more entry.

        Args:
            image: (N, 3, H, W) or None.
            text: (N, context_length) token ids or None.

        Returns:
            With `output_dict`: `image_features`, `text_features`, `logit_scale`, `logit_bias`
            where the model has one and, where both inputs are given, `fused_features`: (N, D),
            normalised. With `fuse_in_loss`, in training mode and from both inputs, the features
            are the raw embeddings, and there are no `fused_features`. Without `output_dict`: the
            open_clip class's tuple and nothing else, since its callers unpack three entries, or
            four of which the last is `logit_bias` (`encode_fused` serves there); in training mode
            with a warning.

        Raises:
            ValueError: in training mode from both inputs, `fuse_in_loss` without `output_dict`.
        """
        if image is None or text is None:
            return super().forward(image, text)
        if not self.output_dict:
            if self.training:
                # Of unit features, which are all that open_clip's tuple holds, GCLLoss would make
                # another fused embedding than this model does.
                if self.fuse_in_loss:
                    raise ValueError(
                        "output_dict: expected True with fuse_in_loss, got False: open_clip's "
                        "tuple holds unit features, and the loss has to fuse the raw embeddings"
                    )
                if not torch.compiler.is_compiling():  # a warning would break the graph
                    warnings.warn(
                        f"{type(self).__name__} without output_dict=True returns open_clip's "
                        "tuple, which has no fused_features: GCLLoss would add the unit features, "
                        "which is not CLIP-SF; set model.output_dict = True",
                        stacklevel=2,
                    )
            return super().forward(image, text)
        image_embeddings = self.encode_image(image)
        text_embeddings = self.encode_text(text)
        if self.fuse_in_loss and self.training:
            out = {"image_features": image_embeddings, "text_features": text_embeddings}
        else:
            image_features = F.normalize(image_embeddings, dim=-1)
            fused_features = F.normalize(self._fuse(image_embeddings, text_embeddings), dim=-1)
            out = {
                "image_features": image_features,
                "text_features": F.normalize(text_embeddings, dim=-1),
                "fused_features": fused_features.to(image_features.dtype),
            }
        out["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fusion_weights != _PLAIN_SUM:  # without them the state is open_clip's, key by key
            weights = torch.tensor(self.fusion_weights, dtype=torch.float64, device="cpu")
            destination[prefix + "fusion_weights"] = weights

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # `load_state_dict` hands over a copy.
        saved = state_dict.pop(prefix + "fusion_weights", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if saved is None:
            return
        weights = _checked_fusion_weights(saved.tolist())
        if self.fusion_weights not in (_PLAIN_SUM, weights):
            *_, error_msgs = args
            error_msgs.append(
                f"fusion_weights: expected {self.fusion_weights}, the model's, got {weights}; "
                "give the model none, and set model.fusion_weights after loading to change them"
            )
        self.fusion_weights = weights


_PLAIN_SUM = (1.0, 1.0)


class FusedCLIP(_Fused, open_clip.CLIP):
    """`open_clip.CLIP` that also returns `fused_features`, the score fusion of CLIP-SF (UniIR).

    The raw embeddings are added, `fusion_weights[0] * image + fusion_weights[1] * text`, and the
    sum is normalised. Everything else is `open_clip.CLIP`: constructor arguments, `model(image=x)`
    and `model(text=y)` alone, and the state dict, so that checkpoints go both ways; only
    `fusion_weights` other than (1, 1) are an entry more, which open_clip's class refuses. `GCLLoss`
    takes the output as it is; open_clip's own losses do not know `fused_features`.

    Args:
        fusion_weights: keyword only, `(alpha, beta)`, two finite numbers, not both zero. A model
            of (1, 1) takes over what a state dict holds; a model of others refuses different ones.
        fuse_in_loss: keyword only. In training mode return the raw embeddings and leave fusing and
            normalising to the loss: the same loss and gradients, by score fusion at 4/9 of its
            work. For `GCLLoss` (open_clip's losses do not normalise), given this model's
            `fusion_weights`: in training the loss's count, elsewhere the model's. In evaluation
            mode nothing changes.
        args, kwargs: those of `open_clip.CLIP`.
    """

    _extends = open_clip.CLIP


class FusedCustomTextCLIP(_Fused, open_clip.CustomTextCLIP):
    """`FusedCLIP` over `open_clip.CustomTextCLIP`, the class of configs with `custom_text`."""

    _extends = open_clip.CustomTextCLIP


def create_model_and_transforms(
    model_name: str,
    pretrained: str | None = None,
    *args: Any,
    fusion_weights: Sequence[float] = (1.0, 1.0),
    fuse_in_loss: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, Callable[..., Any], Callable[..., Any]]:
    """`open_clip.create_model_and_transforms`, and the model is a `FusedCLIP`.

    Assign it to `open_clip_train.main.create_model_and_transforms`, with its options bound by
    `functools.partial`. Pretrained weights load as in open_clip, a `FusedCLIP`'s with its
    `fusion_weights`.

    Args:
        fusion_weights, fuse_in_loss: as in `FusedCLIP`.
        model_name, pretrained, args, kwargs: as in `open_clip.create_model_and_transforms`.

    Returns:
        The model (a `FusedCustomTextCLIP` for configs with `custom_text`), the training
        transform and the evaluation transform.

    Raises:
        ValueError: the model is a CoCa.
        TypeError: it is neither a CLIP nor a CustomTextCLIP (a TorchScript model).
    """
    weights_only = kwargs.get("weights_only", True)
    # open_clip would load it strictly into a model that knows no `fusion_weights`.
    fused_checkpoint = _holds_fusion_weights(pretrained, weights_only)
    model, *transforms = open_clip.create_model_and_transforms(
        model_name, None if fused_checkpoint else pretrained, *args, **kwargs
    )
    if isinstance(model, open_clip.CoCa):
        raise ValueError(_OTHER_LOSS.format(f"{model_name}, a CoCa,"))
    fused_class = FusedCustomTextCLIP if isinstance(model, open_clip.CustomTextCLIP) else FusedCLIP
    model = fused_class.from_clip(model, fusion_weights, fuse_in_loss=fuse_in_loss)
    if fused_checkpoint:
        open_clip.load_checkpoint(model, pretrained, weights_only=weights_only)
    return model, *transforms


def _holds_fusion_weights(pretrained: str | None, weights_only: bool) -> bool:
    if not pretrained or not os.path.isfile(pretrained) or pretrained.endswith((".npz", ".npy")):
        return False
    state = open_clip.factory.load_state_dict(pretrained, weights_only=weights_only)
    return "fusion_weights" in state


def _checked_fusion_weights(fusion_weights: Sequence[float]) -> tuple[float, float]:
    try:
        alpha, beta = map(float, fusion_weights)
        valid = math.isfinite(alpha) and math.isfinite(beta) and (alpha, beta) != (0, 0)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"fusion_weights: expected two finite numbers, not both zero, got {fusion_weights!r}"
        )
    return alpha, beta
