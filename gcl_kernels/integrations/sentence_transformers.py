"""sentence-transformers: a loss for its trainer, with and without gradient caching.

Made for sentence-transformers 6 (6.0 and later). The adapter embeds columns and renames arguments,
and holds no maths: `gcl_kernels.gcl_loss` is the loss.

    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from gcl_kernels.integrations.sentence_transformers import GCLLoss

    model = SentenceTransformer("sentence-transformers/clip-ViT-B-32")
    trainer = SentenceTransformerTrainer(
        model=model,
        train_dataset=pairs,  # columns in this order: image, text
        loss=GCLLoss(model),
    )
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gcl_kernels
from gcl_kernels.spec import (
    BackendName,
    ExchangeName,
    OtherPositives,
    SameId,
    SelfSimilarity,
    Table,
    check_positive,
)

try:
    from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
except ImportError as error:
    if (error.name or "").split(".")[0] != "sentence_transformers":
        raise  # sentence-transformers is there, and something that it needs is not
    raise ImportError(
        "gcl_kernels.integrations.sentence_transformers needs sentence-transformers 6 or later: "
        'pip install "sentence-transformers[train]>=6"'
    ) from error

__all__ = ["GCLLoss"]

Column = Literal["image", "text", "fused", "negative"]
_VIEWS: tuple[Column, ...] = ("image", "text", "fused")
_LABEL_COLUMN = 'label column ("label", "labels", "score" or "scores")'
"""The trainer calls all of them labels: which one it took is not known here."""


class GCLLoss(CachedLossMixin, nn.Module):
    """`gcl_kernels.gcl_loss` as a loss of `SentenceTransformerTrainer`.

    Inputs: a dataset with two columns, image and text, or with three, image, text and the pair of
    both; column names are free, their order is not. With two the fused embedding is the sum of the
    model's image and text embeddings as the model gives them, weighted by `fusion_weights`, at 4/9
    of the work (CLIP-like models, which embed one modality at a time). With three it is what the
    model makes of the pair (`{"image": ..., "text": ...}`): a third positive, where
    sentence-transformers' own losses have a hard negative. Hard negatives are columns named
    `"negative"` in `columns`: all of a batch's are negatives of every anchor, as there; of several
    processes, of the anchors of their own.

    Labels: none, or integers (a `label` column) that serve as `sample_ids`. Samples of one label
    are neither positives nor negatives of each other: duplicates, several captions of one image.
    Where the first batch's are all equal, a warning; looking waits for the device, once.

    Args:
        model: a `SentenceTransformer`.
        scale: logits are cosine similarities times `scale`, which is 1 / temperature; default 20,
            as in sentence-transformers' losses.
        mini_batch_size: None, or the rows to embed at a time with gradient caching (GradCache, as
            sentence-transformers' `Cached...` losses do): every input is embedded twice, and memory
            for activations is that of so many rows whatever the batch.
        columns: what the columns are, in their order: "image", "text", if there is one "fused",
            and "negative" any number of times. Default: image, text, fused, and of three columns
            the third must show that it is a pair, by holding the modalities of both others.
        gather_across_devices: with several processes, all their embeddings are candidates (`group`
            in `gcl_kernels.gcl_loss`). With one it changes nothing.
        pair_weights, candidates, same_id, extra_anchors, false_negative_margin, self_similarity,
            other_positives, fusion_weights, compute_dtype, backend, exchange: as in
            `gcl_kernels.gcl_loss`, same defaults; `extra_anchors` are of the hard negatives.

    Raises:
        ValueError, TypeError: malformed options, as from `gcl_kernels.GCLLoss`; `mini_batch_size`
            with a model on a `StaticEmbedding`, whose inputs have no rows.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        mini_batch_size: int | None = None,
        columns: Sequence[Column] | None = None,
        gather_across_devices: bool = False,
        pair_weights: Table | None = None,
        candidates: Table | None = None,
        same_id: SameId = "ignore",
        extra_anchors: Sequence[bool] | None = None,
        false_negative_margin: float | None = None,
        self_similarity: SelfSimilarity = "mask",
        other_positives: OtherPositives = "compete",
        fusion_weights: Sequence[float | Tensor] = (1.0, 1.0),
        compute_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
        exchange: ExchangeName = "gather",
    ) -> None:
        super().__init__()
        if columns is not None:
            columns = tuple(columns)
            views = sorted(name for name in columns if name != "negative")
            if views not in (sorted(_VIEWS[:2]), sorted(_VIEWS)):
                raise ValueError(
                    'columns: expected "image", "text" and, if there is one, "fused", each once, '
                    f'and any number of "negative", in the dataset\'s order, got {columns}'
                )
        self.uses_gradient_cache = mini_batch_size is not None
        if mini_batch_size is not None:
            if not isinstance(mini_batch_size, int) or mini_batch_size < 1:
                raise ValueError(
                    "mini_batch_size: expected None or an integer of at least 1, got "
                    f"{mini_batch_size!r}"
                )
            if has_static_embedding_input(model):
                raise ValueError(
                    "mini_batch_size: expected None with a StaticEmbedding, whose inputs cannot be "
                    f"split into mini-batches, got {mini_batch_size}"
                )
            self.mini_batch_size = mini_batch_size
        self.model = model
        self.scale = check_positive("scale", scale)
        self.columns = columns
        self._labels_seen = False
        self.gather_across_devices = gather_across_devices
        self.options: dict[str, Any] = {
            "pair_weights": pair_weights,
            "candidates": candidates,
            "same_id": same_id,
            "extra_anchors": extra_anchors,
            "false_negative_margin": false_negative_margin,
            "self_similarity": self_similarity,
            "other_positives": other_positives,
            "fusion_weights": fusion_weights,
            "compute_dtype": compute_dtype,
            "backend": backend,
            "exchange": exchange,
        }
        self.loss = gcl_kernels.GCLLoss(**self.options)

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of one batch, a scalar (float32, or float64 for float64 embeddings).

        Args:
            sentence_features: the preprocessed columns.
            labels: (N,) integers or None, see the class.

        Raises:
            ValueError: another number of columns; three columns of which the third does not show
                that it is a pair, without `columns`.
            TypeError: labels that are no integers.
        """
        columns = self._in_order(list(sentence_features))
        self._check_labels(labels)
        if self.uses_gradient_cache:
            return self.forward_cached(columns, labels)
        return self.calculate_loss(
            [[self.model(column)["sentence_embedding"]] for column in columns], labels
        )

    def _in_order(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The columns as image, text, if there is one fused, and negatives."""
        if self.columns is not None:
            if len(features) != len(self.columns):
                raise ValueError(
                    f"columns: expected {len(features)} names for as many input columns, "
                    f"got {self.columns}"
                )
            return [
                column
                for wanted in (*_VIEWS, "negative")
                for name, column in zip(self.columns, features, strict=True)
                if name == wanted
            ]
        if len(features) not in (2, 3):
            raise ValueError(
                "GCLLoss: expected 2 input columns (image, text) or 3 (image, text, pair), "
                f"got {len(features)}"
            )
        if len(features) == 3:
            image, text, pair = (_modalities(column) for column in features)
            if not (image and text and pair == image | text and image != pair != text):
                raise ValueError(
                    "columns: expected a third input column of image-text pairs, which holds the "
                    f"modalities of both others, got {sorted(image)}, {sorted(text)} and "
                    f"{sorted(pair)}. GCLLoss trains a third column as a positive, the fused view, "
                    "where sentence-transformers' losses take a hard negative. Say which it is: "
                    'GCLLoss(model, columns=("image", "text", "fused")) or ("image", "text", '
                    '"negative")'
                )
        return features

    def _check_labels(self, labels: Tensor | None) -> None:
        if labels is None:
            return
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
            raise TypeError(
                f"{_LABEL_COLUMN}: expected one integer a sample, equal for samples that are no "
                f"negatives of each other, or no such column, got shape {list(labels.shape)} of "
                f"{labels.dtype}; remove or rename the column"
            )
        if not self._labels_seen:
            self._labels_seen = True
            if len(labels) > 1 and (labels == labels[0]).all():
                warnings.warn(
                    f"{_LABEL_COLUMN}: all {len(labels)} labels of the first batch are equal, and "
                    "samples of one label are no negatives of each other: the loss has no "
                    "negatives. Remove the column, or shuffle the data",
                    stacklevel=3,
                )

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of embeddings: for each column the parts of its (N, D), as :meth:`_in_order`.

        `with_backward`: leave the gradients on the parts, and return the loss without its graph.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Asked here: losses are often made before the trainer's arguments start the processes.
        self.loss.group = "world" if self.gather_across_devices and distributed else None
        columns = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in reps]
        negatives = 0 if self.columns is None else self.columns.count("negative")
        views, extra = columns[: len(columns) - negatives], None
        if negatives:
            extra = torch.cat(columns[len(views) :])
        loss = self.loss(*views, logit_scale=self.scale, sample_ids=labels, extra_negatives=extra)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {**self._own_options(), **self.options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._own_options().items())

    def _own_options(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "mini_batch_size": self.mini_batch_size if self.uses_gradient_cache else None,
            "columns": self.columns,
            "gather_across_devices": self.gather_across_devices,
        }


def _modalities(features: dict[str, Any]) -> set[str]:
    """By what sentence-transformers' modules note: empty where they note none (token lists)."""
    modality = features.get("modality", ())
    return {modality} if isinstance(modality, str) else set(modality)
