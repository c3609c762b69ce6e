"""Generalized Contrastive Learning losses in tiles: exact gradients, no similarity matrix."""

from gcl_kernels.dispatch import backends
from gcl_kernels.losses import (
    GCLLoss,
    clip_loss,
    gcl_loss,
    multiview_contrastive_loss,
    neg_lse,
    nt_xent_loss,
)
from gcl_kernels.ranks import hits, positive_ranks, watch_ranks
from gcl_kernels.warming import warmup

__version__ = "0.1.0"

__all__ = [
    "GCLLoss",
    "backends",
    "clip_loss",
    "gcl_loss",
    "hits",
    "multiview_contrastive_loss",
    "neg_lse",
    "nt_xent_loss",
    "positive_ranks",
    "watch_ranks",
    "warmup",
]
