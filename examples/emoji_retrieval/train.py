"""One training run: the same model, start, batches and schedule for either loss."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import gcl_kernels
from gcl_kernels.retrieval import RetrievalDataset

from .data import EmojiData, TrainingBatches
from .evaluate import CUTOFFS, nine_tasks
from .systems import Model, System

LOSSES = ("CL", "GCL")
WARMUP_SHARE = 1 / 8
ALIGNMENT_SEED = 10_000
"""Added to a seed: other batches than those of the training."""
WEIGHT_DECAY = 0.1
VALIDATIONS = 3
TIMED_STEPS = 10
VALIDATION_CUTOFF = CUTOFFS.index(5)


@dataclass
class History:
    """Curves of one run, and what it cost.

    ``validation`` is the mean hit@5 of the nine tasks in the union pool, on validation concepts.
    """

    loss: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    temperature: float = math.nan
    seconds: float = math.nan


def contrastive_loss(name: str, out: dict[str, Tensor]) -> Tensor:
    """The loss of what a system returns: ``"CL"``, CLIP's, or ``"GCL"``.

    A system with two towers gives no fused embeddings: score fusion makes them in the loss.
    """
    e_i, e_t, scale = out["image_features"], out["text_features"], out["logit_scale"]
    if name == "CL":
        return gcl_kernels.clip_loss(e_i, e_t, scale)
    if name == "GCL":
        return gcl_kernels.gcl_loss(e_i, e_t, out.get("fused_features"), scale)
    raise ValueError(f"expected one of {LOSSES}, got {name!r}")


def create_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with CLIP's settings: no weight decay on biases, gains and the temperature."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / max(1, WARMUP_SHARE * steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def begin(system: System, seed: int, data: EmojiData, device: str) -> Model:
    """What training starts from, the same for the same seed."""
    torch.manual_seed(seed)
    model = system.create(system.temperature).to(device)
    if system.alignment_steps:
        steps = system.alignment_steps
        model.align(TrainingBatches(data, system.batch_size, steps, ALIGNMENT_SEED + seed), steps)
    return model


def train(
    system: System,
    loss_name: str,
    seed: int,
    start: Model,
    data: EmojiData,
    validation: Sequence[RetrievalDataset],
) -> tuple[Model, History]:
    """Train a copy of the start on the seed's batches and return it in eval mode.

    Parameters
    ----------
    validation
        Tasks of the union pool, or none.
    """
    model = copy.deepcopy(start)
    device = next(model.parameters()).device
    optimizer = create_optimizer(model, system.rates[loss_name])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, system.steps)
    )
    batches = TrainingBatches(data, system.batch_size, system.steps, seed)
    validate_every = max(1, system.steps // VALIDATIONS)
    history = History()
    model.train()
    started = time.perf_counter()
    with tqdm(batches, desc=f"{system.title}, {loss_name}, seed {seed}", unit="step") as progress:
        for step, (images, texts) in enumerate(progress, start=1):
            out = model(images.to(device), texts)
            loss = contrastive_loss(loss_name, out)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.clamp_temperature()
            history.loss.append(loss.item())
            if validation and (step % validate_every == 0 or step == system.steps):
                hits = nine_tasks(model.encoder(system.fusions[0]), validation)["union"]
                history.validation_step.append(step)
                history.validation.append(float(hits[..., VALIDATION_CUTOFF].mean()))
            progress.set_postfix(
                loss=f"{loss.item():.3f}",
                val=f"{history.validation[-1]:.1f}" if history.validation else "-",
            )
    history.seconds = time.perf_counter() - started
    history.temperature = 1 / out["logit_scale"].item()
    return model.eval(), history


def loss_share(system: System, loss_name: str, start: Model, data: EmojiData) -> dict[str, float]:
    """Time the loss, forward and backward, beside a whole training step: medians in seconds."""
    model = copy.deepcopy(start).train()
    device = next(model.parameters()).device
    optimizer = create_optimizer(model, system.rates[loss_name])

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    step_times, loss_times = [], []
    start = clock()
    for images, texts in TrainingBatches(data, system.batch_size, TIMED_STEPS + 1, 0):
        out = model(images.to(device), texts)
        # On leaves, so that backward stops at the features and times the loss alone.
        leaves = {key: value.detach().requires_grad_() for key, value in out.items()}
        loss_start = clock()
        contrastive_loss(loss_name, leaves).backward()
        loss_end = clock()
        features = [key for key in out if leaves[key].grad is not None and out[key].requires_grad]
        optimizer.zero_grad()
        torch.autograd.backward([out[k] for k in features], [leaves[k].grad for k in features])
        optimizer.step()
        end = clock()
        loss_times.append(loss_end - loss_start)
        step_times.append(end - start)
        start = end
    # The first step warms caches up.
    loss_seconds = float(np.median(loss_times[1:]))
    step_seconds = float(np.median(step_times[1:]))
    return {
        "loss_seconds": loss_seconds,
        "step_seconds": step_seconds,
        "share": loss_seconds / step_seconds,
    }
