"""The norm of the whole gradient, and exact clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from verl_sft.distributed.reduce import sum_over_ranks
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import local


def gradient_norm(parameters: Iterable[nn.Parameter], *, world: World) -> float:
    """The 2-norm of the whole gradient over all parameters and ranks; NaN or inf if any part is."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    squares = 0.0
    if grads:
        norms = torch.stack(torch._foreach_norm([g for g in grads if g.numel()] or grads, 2))
        squares = float(norms.double().square().sum())
    return math.sqrt(sum_over_ranks([squares], world=world)[0] / world.num_replicas)


def scale_gradients(parameters: Iterable[nn.Parameter], *, factor: float) -> None:
    """Multiply all gradients in place."""
    torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
