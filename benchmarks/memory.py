"""The memory estimate of `verl-sft plan` against the peak of a training step on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.report import row

CASES = ("full fp32", "full fp32 recomputed", "LoRA fp32", "full bf16", "LoRA bf16 recomputed")
TOKENS, LEARNED = 4096, 1365
DIMENSIONS = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16_384,
    "tie_word_embeddings": True,
}


def measure(case: str) -> tuple[float, float]:
    """Estimate and growth of the peak over two optimizer steps, in MiB; a process of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    from verl_sft.distributed.setup import setup_world
    from verl_sft.distributed.sharding import shard
    from verl_sft.model.attention import SPLIT, register_attention
    from verl_sft.model.build import decoder_layers
    from verl_sft.model.loss import LossModel
    from verl_sft.model.shape import read_shape
    from verl_sft.trainer.memory import MemorySettings, estimate_memory

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    world = setup_world("cpu")
    register_attention()
    torch.randn(64, 64).matmul(torch.randn(64, 64)).sum().item()  # libraries are loaded now
    before = memory("VmRSS")
    config = Qwen2Config(**DIMENSIONS)
    causal = AutoModelForCausalLM.from_config(config, attn_implementation=SPLIT)
    adapters = None
    if "LoRA" in case:
        get_peft_model(causal, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapters = sum(p.numel() for p in causal.parameters() if p.requires_grad)
    if "recomputed" in case:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    model = LossModel(causal).train()
    shard(model, layers=decoder_layers(causal), world=world, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, DIMENSIONS["vocab_size"], (1, TOKENS))
    weights = (torch.arange(TOKENS)[None] % 3 == 0).float()
    half_way = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
    positions = torch.arange(TOKENS // 2).repeat(2)[None]
    for _ in range(2):
        model(ids, positions, half_way, TOKENS // 2, ids, weights, denominator=1000.0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    settings = MemorySettings(
        compute_bytes=dtype.itemsize,
        adapters=adapters,
        checkpointing="full" if "recomputed" in case else "none",
        scores=dtype is torch.bfloat16,
    )
    estimate = estimate_memory(
        read_shape(config.to_dict()),
        settings=settings,
        tokens=TOKENS,
        learned=LEARNED,
        longest=TOKENS // 2,
    )
    return estimate.total / 2**20, memory("VmHWM") - before


def memory(name: str) -> float:
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
        lines = subprocess.check_output(command, text=True).splitlines()
        estimated, measured = json.loads(lines[-1])
        error = estimated / measured - 1
        row(f"memory estimate, {case}", f"{error:+.0%}",
            f"{estimated:.0f} MiB estimated, {measured:.0f} MiB measured")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
