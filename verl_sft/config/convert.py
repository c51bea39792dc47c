"""What `convert` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl_sft.config.checks import at_least, fraction, one_of, rows_or_all
from verl_sft.config.secrets import hide_all
from verl_sft.config.select import SelectConfig
from verl_sft.config.sources import AgentRLConfig, RawConfig


@dataclass
class ConvertConfig:
    """`verl-sft convert in=... out=... from=... to=...`: any known format into any other.

    On the command line `in`, `from` and `to` stand for `inputs`, `source` and `target`.
    """

    inputs: Any = None  # files, a directory, a glob, or a list of these
    out: str | None = None  # a file, or for to=own a directory with train and val files
    source: str = "auto"  # format of the input, or file.py:function
    target: str = "own"  # format of the output
    view: str = "as_is"  # as_is | per_turn: one record per learned turn, with the chat before it
    order: str = "as_is"  # as_is | episode: an episode's rows together, by step; held in memory
    agentrl: AgentRLConfig = field(default_factory=AgentRLConfig)
    raw: RawConfig = field(default_factory=RawConfig)
    val_fraction: float = 0.1  # share of the groups held out, where `out` is a directory
    seed: int = 1  # of the split
    select: SelectConfig = field(default_factory=SelectConfig)
    dedup: bool = True  # of records with equal content the first stays
    max_rows: int = -1  # records to write; -1: all
    max_reject_fraction: float = 0.05  # above it the command fails; what was read is kept

    def __post_init__(self) -> None:
        self.inputs = hide_all(self.inputs)
        one_of("view", self.view, ("as_is", "per_turn"))
        one_of("order", self.order, ("as_is", "episode"))
        fraction("val_fraction", self.val_fraction)
        fraction("max_reject_fraction", self.max_reject_fraction)
        at_least("seed", self.seed, 0)
        rows_or_all("max_rows", self.max_rows)
