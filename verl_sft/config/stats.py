"""What `stats` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl_sft.config.checks import fraction
from verl_sft.config.secrets import hide_all
from verl_sft.config.select import SelectConfig


@dataclass
class StatsConfig:
    """`verl-sft stats in=DIR`: what is in this data, and does any of it leak?

    On the command line `in` and `from` stand for `inputs` and `source`; a directory gives its train
    and val files.
    """

    inputs: Any = None  # files, an sft_data directory, a glob, or a list of these
    against: Any = None  # more files whose tasks and texts must not be in the data
    source: str = "auto"  # format, or file.py:function
    model: str | None = None  # HF folder: count tokens with its tokenizer and chat template
    out: str | None = None  # directory for stats.json and stats.png
    select: SelectConfig = field(default_factory=SelectConfig)
    strict: bool = False  # end with exit code 3 where rows are refused, repeated or shared
    max_reject_fraction: float = 1.0  # above it the command fails

    def __post_init__(self) -> None:
        self.inputs, self.against = hide_all(self.inputs), hide_all(self.against)
        fraction("max_reject_fraction", self.max_reject_fraction)
