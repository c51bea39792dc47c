"""The memory estimate of `verl-sft plan` against the peak of training steps on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import row

# Words of each case: LoRA, bf16, what is recomputed, padded rows, documents of 4096 tokens.
CASES = (
    "full fp32",
    "full fp32 selective",
    "full fp32 recomputed",
    "full bf16",
    "full bf16 recomputed",
    "full bf16 long",
    "full bf16 long recomputed",
    "LoRA fp32",
    "LoRA bf16",
    "LoRA bf16 long recomputed",
)
TOKENS, SHORT = 4096, 512
# Large blocks are given back at once, so that the peak is what was allocated and not how the heap
# came to lie (with the threshold of the C library: up to twice as much, as of LoRA in fp32).
EXACT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
DIMENSIONS = {
    "hidden_size": 384,
    "intermediate_size": 1056,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 16_384,
    "tie_word_embeddings": True,
    "max_position_embeddings": TOKENS,
}


def measure(case: str) -> tuple[float, float]:
    """Estimate and growth of the peak over two optimizer steps, in MiB; a process of its own."""
    import torch

    from verl_sft.distributed.setup import setup_world
    from verl_sft.model.attention import register_attention
    from verl_sft.model.shape import read_shape
    from verl_sft.trainer.memory import MemorySettings, estimate_memory

    torch.set_num_threads(1)
    world = setup_world("cpu")
    register_attention()
    small = {**DIMENSIONS, "hidden_size": 48, "intermediate_size": 96, "vocab_size": 64}
    train(case, dimensions=small, world=world, tokens=SHORT)  # libraries are loaded now
    before = begin()
    adapters = train(case, dimensions=DIMENSIONS, world=world, tokens=TOKENS)
    policy = "selective" if "selective" in case else "full" if "recomputed" in case else "none"
    half = "bf16" in case
    estimate = estimate_memory(
        read_shape({**DIMENSIONS, "model_type": "qwen2"}),
        settings=MemorySettings(
            compute_bytes=2 if half else 4,
            adapters=adapters,
            checkpointing=policy,
            scores=half,
            logit_rows=256,
        ),
        tokens=TOKENS,
        learned=TOKENS // 3 + 1,
        longest=document(case, TOKENS),
    )
    return estimate.total / 2**20, status("VmHWM") - before


def document(case: str, tokens: int) -> int:
    """Length of each document."""
    return tokens if "long" in case else tokens // 8


def train(case: str, *, dimensions: dict[str, Any], world: Any, tokens: int) -> int | None:
    """Two optimizer steps; returns the parameters of adapters, if there are any."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    from verl_sft.distributed.sharding import shard
    from verl_sft.model.activations import recompute_activations
    from verl_sft.model.attention import SPLIT
    from verl_sft.model.build import decoder_layers
    from verl_sft.model.loss import LossModel

    causal = AutoModelForCausalLM.from_config(Qwen2Config(**dimensions), attn_implementation=SPLIT)
    adapters = None
    if "LoRA" in case:
        get_peft_model(causal, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapters = sum(p.numel() for p in causal.parameters() if p.requires_grad)
    if "recomputed" in case or "selective" in case:
        recompute_activations(causal, policy="full" if "recomputed" in case else "selective")
    model = LossModel(causal).train()
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    shard(model, layers=decoder_layers(causal), world=world, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, dimensions["vocab_size"], (1, tokens))
    weights = (torch.arange(tokens)[None] % 3 == 0).float()
    length = document(case, tokens)
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    positions = torch.arange(length).repeat(tokens // length)[None]
    for _ in range(2):
        model(ids, positions, bounds, length, ids, weights, denominator=1000.0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return adapters


def begin() -> float:
    """Give back what is free and forget the peak so far; resident MiB now."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> float:
    """A line of this process's status, in MiB."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) / 1024 for line in stream if line.startswith(name))


def main(words: list[str]) -> None:
    """All cases, or as a child the named one."""
    if words:
        print(json.dumps(measure(words[0])))
        return
    for case in CASES:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", case]
        lines = subprocess.check_output(command, text=True, env=os.environ | EXACT).splitlines()
        estimated, measured = json.loads(lines[-1])
        error = estimated / measured - 1
        row(f"memory estimate, {case}", f"{error:+.0%}",
            f"{estimated:.0f} MiB estimated, {measured:.0f} MiB measured")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
