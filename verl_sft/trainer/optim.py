"""Groups of parameters, the learning rate as a pure function of the step, exact clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from verl_sft.config.train import OptimConfig
from verl_sft.distributed.reduce import sum_over_ranks
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import local
from verl_sft.trainer.optimizers import build_optimizer, set_rate

_WSD_DECAY = 0.1  # share of the run in which warmup-stable-decay comes down


def make_optimizer(
    model: nn.Module, *, config: OptimConfig, shard_size: int = 1
) -> torch.optim.Optimizer:
    """The chosen optimizer over the trainable parameters.

    Norms and biases are not decayed by default. Matrices B of adapters learn
    `optim.loraplus_lr_ratio` times as fast: their groups have that `lr_scale`.
    """
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 or config.decay_norms_and_biases
            faster = config.loraplus_lr_ratio is not None and "lora_B" in name
            faster |= config.loraplus_lr_ratio is not None and "lora_embedding_B" in name
            found.setdefault((not decayed, faster), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "lr_scale": config.loraplus_lr_ratio if faster else 1.0,
        }
        for (plain, faster), parameters in sorted(found.items(), key=lambda item: item[0])
    ]
    heads = [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    ]
    output = getattr(getattr(model, "causal", None), "get_output_embeddings", lambda: None)()
    if output is not None:
        heads.extend(output.parameters())
    return build_optimizer(groups, config=config, shard_size=shard_size, heads=heads)


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
