"""Tokens per second of the trainer on a 3.4M-parameter model, on 1 and 2 gloo ranks of this CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.report import row
from verl_sft.collect.collector import collect
from verl_sft.config.collect import (
    CollectConfig,
    EnvConfig,
    MakeGamesConfig,
    MakeModelConfig,
    OutputConfig,
    PromptConfig,
    RolloutConfig,
)
from verl_sft.envs.alfworld_games import make_games
from verl_sft.model.tiny import make_model
from verl_sft.trainer.launch import launch

SETTINGS = {
    "bf16, packed": [],
    "fp32, packed": ["engine.dtype=fp32"],
    "bf16, padded": ["use_remove_padding=false"],
    "bf16, LoRA 16": ["model.lora_rank=16"],
}


def main() -> None:
    """Train a few steps in each setting; the first two steps are dropped."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_games(
            MakeGamesConfig(out=str(root / "games"), num=60, num_valid=6), progress=lambda *_: None
        )
        collect(
            CollectConfig(
                env=EnvConfig(data_dir=str(root / "games")),
                prompt=PromptConfig(history="dialogue"),
                rollout=RolloutConfig(num_episodes=120),
                output=OutputConfig(dir=folder, name="data", rows="episode"),
            )
        )
        model = make_model(MakeModelConfig(out=str(root / "model"), data=str(root / "data")))
        for ranks in (1, 2):
            for name, words in SETTINGS.items():
                run = root / f"run_{ranks}_{name.replace(' ', '_')}"
                launch(
                    [
                        f"data.train_files={root / 'data'}",
                        "data.val_files=none",
                        "data.multiturn.enable=true",
                        "data.train_batch_size=16",
                        "data.max_length=4096",
                        "data.max_token_len_per_gpu=8192",
                        "data.micro_batch_size_per_gpu=4",
                        f"model.partial_pretrain={model}",
                        f"trainer.default_local_dir={run}",
                        "trainer.total_training_steps=7",
                        "trainer.logger=[file]",
                        "trainer.export=false",
                        *words,
                    ],
                    nproc=ranks,
                )
                lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                rates = [json.loads(line)["train/tokens_per_second"] for line in lines[2:]]
                row(f"train, {ranks} rank(s), {name}", f"{statistics.median(rates):,.0f} tok/s",
                    "3.4M parameters, dialogues, median of 5 steps")  # fmt: skip


if __name__ == "__main__":
    main()
