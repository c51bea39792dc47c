"""Samples per second of prefix-shared training against its samples one by one (`data/tree.py`).

Conversations as a template makes them that drops old thoughts: each turn is a sample of its own,
which repeats the history. One thread, process time, the same samples and losses on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.report import row
from verl_sft.data.collate import PackedBatch, collate
from verl_sft.data.plan import validation_plan
from verl_sft.data.sample import Int32Array, TokenizedSample, make_sample
from verl_sft.data.tree import shared_lengths
from verl_sft.model.attention import pick_attention
from verl_sft.model.loss import LossModel
from verl_sft.model.tree_attention import register_tree_attention
from verl_sft.trainer.batches import model_inputs

VOCABULARY, BUDGET, STEPS = 8192, 8192, 2
# Tokens of ALFWorld dialogues whose observations list the admissible actions.
PROMPT, OBSERVATION, THOUGHT, ACTION = 450, 200, 80, 15


def main() -> None:
    """Train the same samples both ways, interleaved, for conversations of 6, 12 and 24 turns."""
    torch.set_num_threads(1)
    for turns in (6, 12, 24):
        samples = conversation(turns) + conversation(turns, seed=1)
        models = {share: make(share) for share in (False, True)}
        batches = {share: batches_of(samples, share=share) for share in (False, True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        losses: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(STEPS + 1):
            for share, (model, optimizer) in models.items():
                started = time.process_time()
                losses[share].append(train_step(model, optimizer, batches[share]))
                seconds[share].append(time.process_time() - started)
        split, tree = (len(samples) / min(seconds[share][1:]) for share in (False, True))
        tokens = [sum(int((b.document_ids >= 0).sum()) for b in batches[s]) for s in (False, True)]
        apart = max(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True))
        row(
            f"prefix-shared training, {turns} turns",
            f"{tree / split:.1f} times",
            f"{tree:.1f} against {split:.1f} samples/s; {tokens[1]:,} for {tokens[0]:,} tokens "
            f"({tokens[0] / tokens[1]:.1f}x); losses equal within {apart:.0e} over {STEPS} updates",
        )


def conversation(turns: int, *, seed: int = 0) -> list[TokenizedSample]:
    """One sample for each turn: the history without thoughts, then thought and action."""
    rng = np.random.default_rng(seed)
    history, samples = rng.integers(0, VOCABULARY, PROMPT, dtype=np.int32), []
    for _ in range(turns):
        thought = rng.integers(0, VOCABULARY, THOUGHT, dtype=np.int32)
        action = rng.integers(0, VOCABULARY, ACTION, dtype=np.int32)
        weights = np.r_[np.zeros(len(history)), np.ones(THOUGHT + ACTION)]
        samples.append(
            make_sample(
                np.concatenate((history, thought, action)),
                weights=weights.astype(np.float32),
                record_id=str(seed),
            )
        )
        observation = rng.integers(0, VOCABULARY, OBSERVATION, dtype=np.int32)
        history = np.concatenate((history, action, observation))
    return samples


def batches_of(samples: Sequence[TokenizedSample], *, share: bool) -> list[PackedBatch]:
    """The micro-batches of one optimizer step over all samples."""
    units = np.array([int(sample.record_id) for sample in samples])
    lengths = np.array([len(sample) for sample in samples])
    plan = validation_plan(
        lengths,
        token_budget=BUDGET,
        dp_size=1,
        shared=shared_lengths(_Ids(samples), units=units) if share else None,
    )
    rows = [[[samples[i] for i in row] for row in micro] for micro in plan.ranks[0]]
    return [collate(row, pad_id=0, share=share) for row in rows]


@dataclass(frozen=True)
class _Ids:
    samples: Sequence[TokenizedSample]

    def input_ids(self, index: int) -> Int32Array:
        return self.samples[index].input_ids


def make(share: bool) -> tuple[LossModel, torch.optim.Optimizer]:
    """A Qwen2 model of 4 layers and width 256, fp32, and its optimizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    pick_attention("split", device=torch.device("cpu"), half=False)
    name = register_tree_attention() if share else "verl_sft_split"
    causal: Any = Qwen2ForCausalLM._from_config(config, attn_implementation=name)
    model = LossModel(causal)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def train_step(
    model: LossModel, optimizer: torch.optim.Optimizer, batches: Sequence[PackedBatch]
) -> float:
    """One optimizer step; its loss."""
    weight = sum(float(batch.weights.sum(dtype=torch.float64)) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**model_inputs(batch, torch.device("cpu")), denominator=weight)
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


if __name__ == "__main__":
    main()
