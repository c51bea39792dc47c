"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch

from verl_sft.config.train import OptimConfig
from verl_sft.trainer.optimizers import set_rate

_WSD_DECAY = 0.1  # share of the run in which warmup-stable-decay comes down


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        set_rate(group, lr * group["lr_scale"])


def warmup_steps(config: OptimConfig, *, total_steps: int) -> int:
    """Steps of linear warm-up: the number if given, else the ratio of the run."""
    if config.lr_warmup_steps >= 0:
        return config.lr_warmup_steps
    return int(total_steps * config.lr_warmup_steps_ratio)


def lr_factor(step: int, *, total_steps: int, warmup: int, kind: str, min_ratio: float) -> float:
    """Factor on the peak learning rate for the update number `step`, counted from 0.

    Warm-up rises to the peak in `warmup` updates, never from 0 (that update would be wasted);
    after it `cosine` and `linear` fall to `min_ratio` at the end, `wsd` in its last tenth.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    start = warmup
    if kind == "wsd":
        start = max(warmup, total_steps - max(1, round(total_steps * _WSD_DECAY)))
        if step < start:
            return 1.0
    done = min(1.0, (step - start) / max(1, total_steps - start))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return min_ratio + (1 - min_ratio) * shape
