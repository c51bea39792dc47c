"""Everything of a run but its model: read, tokenise, plan, and say what it would take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from verl_sft.config.train import TrainConfig
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import compute_dtype
from verl_sft.model.build import load_tokenizer, model_path
from verl_sft.trainer.file_checks import check_files
from verl_sft.trainer.inputs import make_plan, read_splits
from verl_sft.trainer.launch import default_nproc
from verl_sft.trainer.memory import MemoryEstimate, estimate_memory, format_bytes, memory_settings
from verl_sft.trainer.option_checks import check_options
from verl_sft.trainer.planning import (
    PlanFigures,
    figure_lines,
    model_shape,
    plan_figures,
    planning_cost,
)
from verl_sft.trainer.sharing import shared_tokens, shuffle_units
from verl_sft.trainer.vocab import plan_divided, vocab_work


@dataclass(frozen=True)
class DryRun:
    """What `verl-sft plan` tells; every value is JSON."""

    world_size: int
    device: str
    dtype: str
    parameters: int
    trained_parameters: int
    quadratic_cost: float
    token_budget: int
    epochs: int
    total_steps: int
    data: dict[str, int]  # rows, refused, learned_tokens
    epoch: PlanFigures  # of the first epoch
    memory: MemoryEstimate  # of one rank
    memory_total: int
    vocabulary: str  # whether the head is divided over the ranks, in words


def dry_run(config: TrainConfig, *, world_size: int | None = None) -> DryRun:
    """Plan the run that `config` describes; the token cache is left where `train` finds it.

    Args:
        config: of the run.
        world_size: ranks; default: as many as `train` would start here.

    Raises:
        UsageError: what `train` would refuse before it loads the model.
        InputError: no usable row, or a sample that fits into no micro-batch.
    """
    size = world_size or default_nproc()
    on_gpu = config.trainer.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    check_options(config, world_size=size)
    model_path(config.model)
    shape = model_shape(config.model)
    tokenizer = load_tokenizer(config.model)
    check_files(config, device=device, num_tokens=len(tokenizer))
    alone = World(rank=0, size=1, device=torch.device("cpu"), mesh=cast(Any, None))
    train, val, _ = read_splits(
        config,
        tokenizer=tokenizer,
        directory=Path(config.trainer.default_local_dir).expanduser(),
        world=alone,
    )
    sp_size = config.ulysses_sequence_parallel_size
    world = World(rank=0, size=size, device=device, mesh=cast(Any, None), sp_size=sp_size)
    plan = make_plan(config, train=train, val=val, world=world)
    shared = None
    if plan.share:
        units = shuffle_units(config, train)
        shared = shared_tokens(config, train, units=units, on_gpu=on_gpu)
    cost = planning_cost(config.model)
    figures = plan_figures(
        plan.train(0),
        lengths=np.asarray(train.lengths),
        learned=train.num_learned(),
        budget=config.data.token_budget,
        quadratic_cost=cost,
        shared=shared,
    )
    half = compute_dtype(config.engine.dtype, device=device) is torch.bfloat16
    settings = memory_settings(config, shape=shape, world_size=size, half=half, on_gpu=on_gpu)
    work = vocab_work(plan.train(0), samples=train, ranks=size)
    divided, vocabulary = plan_divided(
        config, shape=shape, settings=settings, work=work, on_gpu=on_gpu
    )
    settings = replace(settings, divided=divided)
    memory = estimate_memory(
        shape,
        settings=settings,
        tokens=figures.largest_tokens,
        learned=figures.largest_learned,
        longest=figures.longest,
    )
    report = train.report
    return DryRun(
        world_size=size,
        device=device.type,
        dtype="bf16" if half else "fp32",
        parameters=shape.parameters + (settings.adapters or 0),
        trained_parameters=shape.parameters if settings.adapters is None else settings.adapters,
        quadratic_cost=cost,
        token_budget=config.data.token_budget,
        epochs=config.trainer.total_epochs,
        total_steps=plan.total_steps,
        data={
            "rows": report.rows,
            "refused": report.num_rejected + report.dropped.total(),
            "learned_tokens": report.learned_tokens,
        },
        epoch=figures,
        memory=memory,
        memory_total=memory.total,
        vocabulary=vocabulary if size > 1 else "",
    )


def dry_run_lines(result: DryRun) -> list[str]:
    """The table that the command prints."""
    ranks = "1 rank" if result.world_size == 1 else f"{result.world_size} ranks"
    share = result.trained_parameters / max(1, result.parameters)
    parts = sorted(asdict(result.memory).items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
    return [
        *figure_lines(
            result.epoch,
            report=result.data,
            world_size=result.world_size,
            epochs=result.epochs,
            steps=result.total_steps,
        ),
        f"model     {result.parameters:,} parameters, {result.trained_parameters:,} trained "
        f"({share:.1%}); {result.dtype} on {result.device}",
        f"memory    about {format_bytes(result.memory_total)} on each of {ranks}, beside the "
        f"process itself: {named}",
        *([f"head      {result.vocabulary}"] if result.vocabulary else []),
        f"cost      of a document: length + {result.quadratic_cost:.3g} * length^2",
    ]
