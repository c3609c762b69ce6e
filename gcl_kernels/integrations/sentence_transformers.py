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

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import gcl_kernels
from gcl_kernels.spec import check_positive

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


class GCLLoss(CachedLossMixin, nn.Module):
    """`gcl_kernels.gcl_loss` as a loss of `SentenceTransformerTrainer`.

    Inputs: a dataset with two columns, image and text, or with three, image, text and the pair of
    both; column names are free, their order is not. With two the fused embedding is the sum of the
    model's image and text embeddings as the model gives them, weighted by `fusion_weights`, at 4/9
    of the work (CLIP-like models, which embed one modality at a time). With three it is what the
    model makes of the pair (`{"image": ..., "text": ...}`).

    Labels: none, or integers (a `label` column) that serve as `sample_ids`. Samples of one label
    are neither positives nor negatives of each other: duplicates, several captions of one image.

    Args:
        model: a `SentenceTransformer`.
        scale: logits are cosine similarities times `scale`, which is 1 / temperature; default 20,
            as in sentence-transformers' losses.
        mini_batch_size: None, or the rows to embed at a time with gradient caching (GradCache, as
            sentence-transformers' `Cached...` losses do): every input is embedded twice, and memory
            for activations is that of so many rows whatever the batch.
        gather_across_devices: with several processes, all their embeddings are candidates (`group`
            in `gcl_kernels.gcl_loss`). With one it changes nothing.
        pair_weights, candidates, self_similarity, other_positives, fusion_weights, compute_dtype,
            backend, exchange: as in `gcl_kernels.gcl_loss`, same defaults.

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
        gather_across_devices: bool = False,
        pair_weights: Any = None,
        candidates: Any = None,
        self_similarity: str = "mask",
        other_positives: str = "compete",
        fusion_weights: tuple[float, float] = (1.0, 1.0),
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
        exchange: str = "gather",
    ) -> None:
        super().__init__()
        check_positive("scale", scale)
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
        self.scale = scale
        self.gather_across_devices = gather_across_devices
        self.options = {
            "pair_weights": pair_weights,
            "candidates": candidates,
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
            sentence_features: the preprocessed columns, two or three.
            labels: (N,) integers or None, see the class.

        Raises:
            ValueError: another number of columns.
        """
        columns = list(sentence_features)
        if len(columns) not in (2, 3):
            raise ValueError(
                "GCLLoss: expected 2 input columns (image, text) or 3 (image, text, pair), "
                f"got {len(columns)}"
            )
        if self.uses_gradient_cache:
            return self.forward_cached(columns, labels)
        return self.calculate_loss(
            [[self.model(column)["sentence_embedding"]] for column in columns], labels
        )

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of embeddings: for each column the parts of its (N, D), in order.

        `with_backward`: leave the gradients on the parts, and return the loss without its graph.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Asked here: losses are often made before the trainer's arguments start the processes.
        self.loss.group = "world" if self.gather_across_devices and distributed else None
        views = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in reps]
        loss = self.loss(*views, logit_scale=self.scale, sample_ids=labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {
            "scale": self.scale,
            "mini_batch_size": self.mini_batch_size if self.uses_gradient_cache else None,
            "gather_across_devices": self.gather_across_devices,
            **self.options,
        }
