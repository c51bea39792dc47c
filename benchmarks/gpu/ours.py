"""Optimizer steps of this trainer's own parts (model, loss, sharding, optimizer) on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.measure import Place, flops_6n, flops_executed, peak_memory, seconds
from benchmarks.shapes import SHAPES, dialogues, model_config
from verl_sft.data.packing import pack
from verl_sft.data.sample import TokenizedSample


@dataclass(frozen=True)
class Setting:
    """One figure: a shape, and the levers that differ from the defaults."""

    shape: str = "1.5B"
    lora: int = 0
    attention: str = "auto"
    compile: bool = False
    recompute: bool = False
    packed: bool = True
    all_rows: bool = False  # the head on all rows, not on the learned ones
    chunk: int = 0  # rows of logits at one time; 0: the default
    fused: bool = True
    tokens: int = 32_768  # of a micro-batch
    micros: int = 2
    longest: int = 2048
    words: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Step:
    """What the measured step was fed."""

    batches: list[dict[str, Any]]
    lengths: list[int]
    learned: int
    rows: int  # of all batches, padding included


def measure(place: Place, setting: Setting, *, section: str, what: str, ceiling: float) -> None:
    """Median seconds of a whole optimizer step, as tokens per second and MFU, and peak memory."""
    step = make_step(setting, device=place.device)
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    run = make_trainer(setting, place=place, step=step)
    losses = [run(), run()]
    took = seconds(run, device=place.device, repeat=1 if place.dry else 5, warm=0)
    losses.append(run())
    tokens = sum(step.lengths)
    rows = step.rows if setting.all_rows else step.learned
    done = flops_executed(
        setting.shape,
        lengths=step.lengths,
        head_rows=rows,
        lora=bool(setting.lora),
        recompute=setting.recompute,
    )
    usual = flops_6n(setting.shape, tokens=tokens) / took / ceiling
    place.write(
        section,
        what,
        tokens / took,
        "tok/s",
        f"MFU {usual:.1%} by 6N, {done / took / ceiling:.1%} by executed FLOPs; peak "
        f"{peak_memory(place.device):.1f} GiB; {took:.3g} s per step of {tokens:,} tokens; loss "
        f"{losses[0]:.4f} to {losses[-1]:.4f}",
    )


def make_step(setting: Setting, *, device: torch.device) -> Step:
    """Packed (or padded) micro-batches of dialogues, on the device."""
    vocabulary = SHAPES[setting.shape][5]
    budget = setting.tokens * setting.micros
    samples: list[TokenizedSample] = []
    seed = 0
    while sum(map(len, samples)) < budget:
        samples += dialogues(16, seed=seed, vocabulary=vocabulary, longest=setting.longest)
        seed += 1
    bins = pack([len(s) for s in samples], budget=setting.tokens)[: setting.micros]
    batches, lengths, learned, rows = [], [], 0, 0
    for members in bins:
        chosen = [samples[i] for i in members]
        lengths += [len(s) for s in chosen]
        learned += sum(s.num_learned for s in chosen)
        batches.append(make_batch(chosen, device=device, packed=setting.packed))
        rows += batches[-1]["input_ids"].numel()
    return Step(batches, lengths, learned, rows)


def make_batch(
    samples: Sequence[TokenizedSample], *, device: torch.device, packed: bool
) -> dict[str, Any]:
    """The tensors of one micro-batch, padded to its longest sample where it is not packed."""
    sizes = [len(s) for s in samples]
    width = max(sizes)
    parts = []
    for sample in samples:
        tail = 0 if packed else width - len(sample)
        arrays = (sample.input_ids, sample.target_ids, sample.weights)
        parts.append([np.pad(a, (0, tail)) for a in arrays])
    segments = sizes if packed else [width] * len(samples)
    ids, targets, weights = (np.concatenate([p[i] for p in parts]) for i in range(3))
    positions = np.concatenate([np.arange(n) for n in segments])
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device=device)[None],
        "target_ids": torch.tensor(targets, dtype=torch.int64, device=device)[None],
        "weights": torch.tensor(weights, dtype=torch.float32, device=device)[None],
        "position_ids": torch.tensor(positions, dtype=torch.int64, device=device)[None],
        "cu_seqlens": torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device),
        "max_seqlen": max(segments),
    }


def make_trainer(setting: Setting, *, place: Place, step: Step) -> Any:
    """A function that makes one optimizer step and returns the loss."""
    from verl_sft.config.train import ModelConfig, OptimConfig
    from verl_sft.distributed.setup import setup_world
    from verl_sft.distributed.sharding import begin_micro_batch, shard
    from verl_sft.model.attention import pick_attention
    from verl_sft.model.build import decoder_layers
    from verl_sft.model.kernels import compile_layers
    from verl_sft.model.lora import add_lora
    from verl_sft.model.loss import LossModel
    from verl_sft.trainer.gradients import gradient_norm, scale_gradients
    from verl_sft.trainer.optimizers import make_optimizer

    world = setup_world("cpu" if place.device.type == "cpu" else "cuda")
    causal = make_model(setting, device=place.device, attention=pick_attention(
        setting.attention, device=place.device, half=True))  # fmt: skip
    if setting.lora:
        add_lora(causal, config=ModelConfig(lora_rank=setting.lora, lora_alpha=2 * setting.lora))
    if setting.recompute:
        newer = getattr(causal, "activation_checkpointing_enable", None)  # the name since 5.2x
        (newer or causal.gradient_checkpointing_enable)({"use_reentrant": False})
    layers = decoder_layers(causal)
    if setting.compile:
        compile_layers(causal, layers=layers)
    model: Any = LossModel(causal)
    model.split_head = model.split_head and not setting.all_rows
    model.chunk = setting.chunk or model.chunk
    model = shard(
        model, layers=layers, world=world, dtype=torch.bfloat16, reshard_after_forward=False
    )
    optimizer = make_optimizer(model, config=OptimConfig(lr=1e-4))
    for group in optimizer.param_groups:
        group.update(fused=setting.fused, foreach=None if setting.fused else False)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = float(sum(b["weights"].sum() for b in step.batches))

    def run() -> float:
        losses = []
        for number, batch in enumerate(step.batches):
            begin_micro_batch(model, last=number == len(step.batches) - 1)
            loss = model(**batch, denominator=total)
            loss.backward()
            losses.append(loss.detach())
        norm = gradient_norm(trained, world=world)
        if norm > 1:
            scale_gradients(trained, factor=1 / norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())

    return run


def make_model(setting: Setting, *, device: torch.device, attention: str) -> Any:
    """Random weights on the device: float32, or bf16 where they are frozen."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if setting.lora else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        causal = AutoModelForCausalLM.from_config(
            model_config(setting.shape, positions=setting.longest + 1),
            dtype=dtype,
            attn_implementation=attention,
        )
    causal.config.use_cache = False
    return causal.train()
