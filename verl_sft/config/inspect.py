"""What `inspect` can be told: everything that `train` can, and where to write."""

from __future__ import annotations

from dataclasses import dataclass

from verl_sft.config.checks import at_least, rows_or_all
from verl_sft.config.train import TrainConfig


@dataclass
class InspectConfig(TrainConfig):
    """`verl-sft inspect`: what would this run train on?"""

    out: str = "audit"  # where audit.json and audit.html appear
    dump: str | None = None  # JSON lines file with every sample's ids and weights
    max_rows: int = -1  # rows to read; -1: data.train_max_samples
    show: int = 3  # samples shown in the terminal
    page_samples: int = 60  # samples of each kind in the page

    def __post_init__(self) -> None:
        rows_or_all("max_rows", self.max_rows)
        at_least("show", self.show, 0)
        at_least("page_samples", self.page_samples, 1)
