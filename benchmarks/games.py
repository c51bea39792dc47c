"""Seconds per game: load, reset and expert play on one core; games made per second.

Uses the public games of ALFWORLD_DATA where they are, else generated ones of full size.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from benchmarks.report import row
from verl_sft.collect.rollout import RolloutSettings, plan_episodes, play
from verl_sft.config.collect import (
    CollectConfig,
    EnvConfig,
    MakeGamesConfig,
    PolicyConfig,
    RolloutConfig,
)
from verl_sft.envs.alfworld import make_alfworld
from verl_sft.envs.alfworld_games import make_games
from verl_sft.policies.expert import make_expert


def play_games(folder: str, expert: str, episodes: int) -> tuple[float, float]:
    """Seconds per game, and share of games won."""
    config = CollectConfig(
        env=EnvConfig(data_dir=folder),
        policy=PolicyConfig(expert=expert),
        rollout=RolloutConfig(num_episodes=episodes),
    )
    env = make_alfworld(config.env)
    specs = plan_episodes(env, config)
    started = time.perf_counter()
    won = [
        e.success
        for e in play(
            specs,
            make_env=lambda: env,
            policy=make_expert(config.policy),
            settings=RolloutSettings.from_config(config),
        )
    ]
    return (time.perf_counter() - started) / len(won), sum(won) / len(won)


def main() -> None:
    """Make games of each size, then play them."""
    with tempfile.TemporaryDirectory() as folder:
        for size, number in (("small", 60), ("medium", 20), ("full", 20)):
            out = str(Path(folder) / size)
            started = time.perf_counter()
            config = MakeGamesConfig(out=out, num=number, num_valid=6, size=size)
            make_games(config, progress=lambda *_: None)
            rate = (number + 12) / (time.perf_counter() - started)
            row(f"make-games size={size}", f"{rate:.1f} games/s", "all cores, each one played")
            for expert in ("planner", "search"):
                took, won = play_games(out, expert, number)
                row(f"{size} game, {expert}", f"{took:.2f} s", f"one core, {won:.0%} won")
        real = os.environ.get("ALFWORLD_DATA")
        if real:
            for expert in ("planner", "search"):
                took, won = play_games(real, expert, 30)
                row(f"public game, {expert}", f"{took:.2f} s", f"one core, {won:.0%} won")


if __name__ == "__main__":
    main()
