"""From checked inputs to a trainer: load, probe and shard the model, make the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from verl_sft.config.train import TrainConfig
from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import compute_dtype, reshard, shard
from verl_sft.errors import UsageError
from verl_sft.model.attention import pick_attention
from verl_sft.model.build import DTYPES, build_model, decoder_layers, probe_packing
from verl_sft.model.levers import apply_levers
from verl_sft.model.quantize import quantised_parameters
from verl_sft.model.tree_attention import register_tree_attention
from verl_sft.model.ulysses import check_heads, probe_slices, register_ulysses
from verl_sft.trainer.file_checks import check_vocabulary
from verl_sft.trainer.inputs import Inputs, make_plan
from verl_sft.trainer.meta_start import check_start, fill, wants_meta
from verl_sft.trainer.optimizers import make_optimizer
from verl_sft.trainer.precision import set_matmul
from verl_sft.trainer.self_checks import require_checks
from verl_sft.trainer.sharing import prove_sharing, without_sharing
from verl_sft.trainer.train_loop import TrainLoop
from verl_sft.trainer.vocab import divide_vocabulary, vocab_work


def assemble(
    config: TrainConfig,
    *,
    world: World,
    inputs: Inputs,
    tokenizer: Any,
    directory: Path,
    marks: dict[str, Any],
) -> tuple[TrainLoop, Any]:
    """Load, probe and shard the model, and put the trainer together."""
    dtype = compute_dtype(config.engine.dtype, device=world.device)
    half = dtype is torch.bfloat16
    if config.engine.model_dtype == "bf16" and world.is_main:
        print("engine.model_dtype=bf16: small updates are lost to rounding; fp32 is the default")
    plan = inputs.plan
    if not half:
        set_matmul(config.engine.fp32_matmul, directory=directory, world=world, say=print)
    model, attention = load_sharded(
        config, world=world, inputs=inputs, num_tokens=len(tokenizer), dtype=dtype
    )
    vocabulary = int(model.causal.config.vocab_size)
    apart = probe_packing(model, device=world.device, half=half, vocab_size=vocabulary)
    if world.sp_group is not None:
        probe_slices(
            model, group=world.sp_group, device=world.device, half=half, vocab_size=vocabulary
        )
    if plan.share:
        proven, line = prove_sharing(
            config, model=model, device=world.device, half=half, vocab_size=vocabulary
        )
        if not proven:
            plan = make_plan(
                without_sharing(config), train=inputs.train, val=inputs.val, world=world
            )
        if world.is_main:
            print(line, flush=True)
    reshard(model)
    optimizer = make_optimizer(model, config=config.optim, shard_size=world.shard_size)
    report = getattr(inputs.train, "report", None)
    require_checks(
        config, world=world, model=model, optimizer=optimizer, report=report,
        attention=attention, dtype=dtype, apart=apart,
    )  # fmt: skip
    trainer = TrainLoop(
        config,
        world=world,
        model=model,
        optimizer=optimizer,
        plan=plan,
        train_data=inputs.train,
        val_data=inputs.val,
        pad_id=int(tokenizer.pad_token_id or 0),
        fingerprint=marks,
        directory=directory,
    )
    return trainer, model


def load_sharded(
    config: TrainConfig, *, world: World, inputs: Inputs, num_tokens: int, dtype: torch.dtype
) -> tuple[Any, str]:
    """The sharded `LossModel`, and the name of its attention in transformers' table.

    Args:
        config: of the run.
        world: the ranks.
        inputs: what will be read.
        num_tokens: of the tokenizer.
        dtype: of compute.
    """
    half = dtype is torch.bfloat16
    with together(world):
        attention = pick_attention(config.model.attn_implementation, device=world.device, half=half)
        if inputs.plan.share:
            attention = register_tree_attention()
        if world.sp_group is not None:
            attention = register_ulysses(attention, group=world.sp_group)
        built = build_model(
            config.model,
            dtype=DTYPES[config.engine.model_dtype],
            attention=attention,
            seed=config.trainer.seed,
            on_meta=wants_meta(config.engine.meta_start, world=world),
            device=world.device,
        )
        apply_levers(built.loss_model, config=config, device=world.device)
        check_start(built, meta_start=config.engine.meta_start)
        check_fit(inputs, model_config=built.causal.config, num_tokens=num_tokens)
        check_heads(built.causal.config, parts=world.sp_size)
        divided = divide_vocabulary(
            built.loss_model,
            config=config,
            world=world,
            dtype=dtype,
            work=vocab_work(inputs.plan.train(0), samples=inputs.train, ranks=world.size),
            say=lambda line: print(line, flush=True) if world.is_main else None,
        )
    model = shard(
        built.loss_model,
        layers=decoder_layers(built.causal),
        world=world,
        dtype=dtype,
        reshard_after_forward=config.engine.reshard_after_forward,
        offload=config.engine.offload,
        whole=quantised_parameters(built.loss_model),
        divided=divided,
    )
    fill(built.slots, world=world, offload=config.engine.offload)
    if divided is not None:
        divided.watch()
    return model, attention


def check_fit(inputs: Inputs, *, model_config: Any, num_tokens: int) -> None:
    """Raise if the tokenizer or the longest sample is more than the model was made for."""
    check_vocabulary(num_tokens, vocabulary=int(model_config.vocab_size))
    longest = int(inputs.train.lengths.max())
    positions = getattr(model_config, "max_position_embeddings", None) or longest
    if longest > positions:
        raise UsageError(
            f"the longest sample has {longest} tokens, the model was made for {positions}",
            fix=f"Use data.max_length={positions} with data.truncation, or another model",
        )
