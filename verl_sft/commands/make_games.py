"""`verl-sft make-games out=DIR num=N seed=S`: procedural ALFWorld games."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.commands.common import progress, read_words, say
from verl_sft.config.collect import MakeGamesConfig


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    config = read_words(MakeGamesConfig, words, usage="verl-sft make-games out=DIR [key=value ...]")
    if config is None:
        return 0
    from verl_sft.envs.alfworld_games import make_games

    with progress("games") as bar:
        report = make_games(config, progress=bar.update)
    for name in report.skipped:
        say(f"skipped: {name}")
    print(f"{len(report.games)} games, {report.made} of them new")
    print(report.out)
    return 0
