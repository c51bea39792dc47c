"""From parquet to the first batch: tokenise, pack and plan 10,000 rows (goal: 30 s on 2 cores)."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.report import row
from verl_sft.collect.collector import collect
from verl_sft.config.collect import (
    CollectConfig,
    EnvConfig,
    MakeGamesConfig,
    MakeModelConfig,
    OutputConfig,
    RolloutConfig,
)
from verl_sft.config.train import DataConfig, MultiturnConfig
from verl_sft.data.load import load_samples
from verl_sft.data.plan import plan_epoch
from verl_sft.envs.alfworld_games import make_games
from verl_sft.model.tiny import make_model
from verl_sft.records.io import write_parquet
from verl_sft.records.read import read_records
from verl_sft.records.resolve import resolve_files

ROWS = 10_000


def main() -> None:
    """Collect some episodes, repeat their step rows to 10,000, and start as a trainer would."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_games(
            MakeGamesConfig(out=str(root / "games"), num=60, num_valid=6), progress=lambda *_: None
        )
        collect(
            CollectConfig(
                env=EnvConfig(data_dir=str(root / "games")),
                rollout=RolloutConfig(num_episodes=60),
                output=OutputConfig(dir=folder, name="data"),
            )
        )
        model = make_model(MakeModelConfig(out=str(root / "model"), data=str(root / "data")))
        few = list(read_records(resolve_files(str(root / "data"), split="train")))
        many = [few[i % len(few)] for i in range(ROWS)]
        write_parquet(root / "many.parquet", many, metadata={})
        for multiturn in (False, True):
            config = DataConfig(max_length=4096, multiturn=MultiturnConfig(enable=multiturn))
            name = "multi-turn" if multiturn else "single-turn"
            for attempt in ("cold", "warm"):
                started = time.perf_counter()
                store = load_samples(
                    [root / "many.parquet"],
                    tokenizer=str(model),
                    config=config,
                    cache_dir=root / f"cache_{multiturn}",
                )
                plan_epoch(
                    store.lengths,
                    seed=0,
                    epoch=0,
                    token_budget=8192,
                    train_batch_size=128,
                    dp_size=2,
                )
                took = time.perf_counter() - started
                note = f"{ROWS} step rows, {store.lengths.sum() / 1e6:.1f}M tokens, {attempt} cache"
                row(f"start of training, {name}", f"{took:.1f} s", note)


if __name__ == "__main__":
    main()
