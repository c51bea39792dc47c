"""Episodes per second of the whole collector with 1 and 2 workers (goal: 1.7 times as many)."""

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
    OutputConfig,
    RolloutConfig,
)
from verl_sft.envs.alfworld_games import make_games


def main() -> None:
    """Collect the same episodes with each number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        games = str(Path(folder) / "games")
        make_games(MakeGamesConfig(out=games, num=100, num_valid=6), progress=lambda *_: None)
        took = {}
        for workers in (1, 2):
            config = CollectConfig(
                env=EnvConfig(data_dir=games),
                rollout=RolloutConfig(num_episodes=300, num_workers=workers),
                output=OutputConfig(dir=folder, name=f"data_{workers}", rows="episode"),
            )
            started = time.perf_counter()
            collect(config)
            took[workers] = time.perf_counter() - started
            rate = 300 / took[workers]
            row(f"collect, {workers} worker(s)", f"{rate:.1f} episodes/s", "small games, search")
        row("collect, 1 -> 2 workers", f"{took[1] / took[2]:.2f} x", "with start and publishing")


if __name__ == "__main__":
    main()
