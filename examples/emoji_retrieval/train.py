"""One training run: the same model, start, batches and schedule for either loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import gcl_kernels
from gcl_kernels.integrations.open_clip import FusedCLIP, GCLLoss

from .data import EmojiData, Tokenizer, TrainingBatches
from .evaluate import CUTOFFS, evaluate
from .model import create_model

LOSSES = ("CL", "GCL")
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.1
MAX_LOGIT_SCALE = 100.0
VALIDATION_CUTOFF = CUTOFFS.index(5)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; all but the learning rate are the same for both losses."""

    steps: int
    batch_size: int
    learning_rate: float
    temperature: float
    learn_temperature: bool
    device: str
    validations: int = 10


@dataclass
class History:
    """Curves of one run, and what it cost.

    ``validation`` is the mean Recall@5 of the nine tasks in the global pool, on the validation
    concepts.
    """

    loss: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    temperature: float = math.nan
    seconds: float = math.nan


def contrastive_loss(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a function from the model's output to the loss."""
    if name == "CL":
        return lambda out: gcl_kernels.clip_loss(
            out["image_features"], out["text_features"], out["logit_scale"]
        )
    if name == "GCL":
        generalized = GCLLoss()
        return lambda out: generalized(**out)
    raise ValueError(f"expected one of {LOSSES}, got {name!r}")


def create_optimizer(model: FusedCLIP, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with CLIP's settings: no weight decay on biases, gains and ``logit_scale``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / min(WARMUP_STEPS, steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    loss_name: str, seed: int, config: TrainConfig, data: EmojiData, tokenizer: Tokenizer
) -> tuple[FusedCLIP, History]:
    """Train from the seed's start on the seed's batches and return the model in eval mode."""
    fuse_in_loss = loss_name == "GCL"  # by score fusion: the same numbers for 4/9 of the work
    model = create_model(seed, config.temperature, config.learn_temperature, fuse_in_loss)
    model.to(config.device)
    compute_loss = contrastive_loss(loss_name)
    optimizer = create_optimizer(model, config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.steps)
    )
    batches = TrainingBatches(data, tokenizer, config.batch_size, config.steps, seed)
    validate_every = max(1, config.steps // config.validations)
    history = History()
    model.train()
    started = time.perf_counter()
    with tqdm(batches, desc=f"{loss_name:>3}, seed {seed}", unit="step") as progress:
        for step, (images, tokens) in enumerate(progress, start=1):
            loss = compute_loss(model(images.to(config.device), tokens.to(config.device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
            history.loss.append(loss.item())
            if step % validate_every == 0 or step == config.steps:
                recalls = evaluate(model, data, data.split.val, tokenizer)["global"]
                history.validation_step.append(step)
                history.validation.append(float(recalls[..., VALIDATION_CUTOFF].mean()))
            progress.set_postfix(
                loss=f"{loss.item():.3f}",
                val=f"{history.validation[-1]:.1f}" if history.validation else "-",
            )
    history.seconds = time.perf_counter() - started
    history.temperature = 1 / model.logit_scale.exp().item()
    return model.eval(), history


def loss_share(
    loss_name: str,
    fuse_in_loss: bool,
    config: TrainConfig,
    data: EmojiData,
    tokenizer: Tokenizer,
    repeats: int = 10,
) -> dict[str, float]:
    """Time the loss, forward and backward, beside a whole training step: medians in seconds.

    Where the model fuses, its sum and its normalisation count as the step's, not as the loss's.
    """
    model = create_model(0, config.temperature, fuse_in_loss=fuse_in_loss)
    model.to(config.device).train()
    optimizer = create_optimizer(model, config.learning_rate)
    compute_loss = contrastive_loss(loss_name)

    def clock() -> float:
        if torch.device(config.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    step_times, loss_times = [], []
    start = clock()
    for images, tokens in TrainingBatches(data, tokenizer, config.batch_size, repeats + 1, 0):
        out = model(images.to(config.device), tokens.to(config.device))
        # On leaves, so that backward stops at the features and times the loss alone.
        leaves = {key: value.detach().requires_grad_() for key, value in out.items()}
        loss_start = clock()
        compute_loss(leaves).backward()
        loss_end = clock()
        features = [key for key in out if leaves[key].grad is not None]
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
