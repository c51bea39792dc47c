"""What `quickstart` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from verl_sft.config.checks import at_least, fraction


@dataclass
class QuickstartConfig:
    """`verl-sft quickstart`: the sizes of each stage; the defaults take minutes on 2 cores."""

    out: str = "quickstart"
    seed: int = 0
    train_games: int = 700
    eval_games: int = 60
    game_size: str = "tiny"  # 3-5 receptacles; see make-games
    episodes: int = 1200  # expert episodes; more than train_games means several per game
    longest_episode: int = 16  # steps; longer ones are not learned from
    noise: float = 0.1  # share of the expert's steps that are random, so that recovery is learned
    model_size: str = "tiny"
    vocab_size: int = 1024
    epochs: int = 4
    lr: float = 4e-3
    prompt_weight: float = 0.2  # of the game's words: a model from scratch learns names from them
    batch_size: int = 2  # episodes per optimizer step: a model from scratch needs many small ones
    max_length: int = 2048
    token_budget: int = 4096  # tokens per micro-batch and rank
    max_steps: int = 30  # steps of an evaluation episode
    nproc: int | None = None  # ranks; default: GPUs, else 2

    def __post_init__(self) -> None:
        at_least("train_games", self.train_games, 1)
        at_least("eval_games", self.eval_games, 1)
        at_least("episodes", self.episodes, 10)
        fraction("noise", self.noise)
        at_least("prompt_weight", self.prompt_weight, 0)
