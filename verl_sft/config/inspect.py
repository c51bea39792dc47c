"""What `inspect` can be told: the data and model sections of a training run, and where to write."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl_sft.config.checks import at_least
from verl_sft.config.train import DataConfig, ModelConfig


@dataclass
class InspectConfig:
    """`verl-sft inspect`: what would this run train on?"""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    out: str = "audit"  # where audit.json and audit.html appear
    dump: str | None = None  # JSON lines file with every sample's ids and weights
    max_rows: int = -1  # rows to read; -1: all
    show: int = 3  # samples shown in the terminal
    page_samples: int = 60  # samples of each kind in the page

    def __post_init__(self) -> None:
        at_least("show", self.show, 0)
        at_least("page_samples", self.page_samples, 1)
