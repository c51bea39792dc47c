"""What `plan` can be told: everything that `train` can, and what to plan for."""

from __future__ import annotations

from dataclasses import dataclass

from verl_sft.config.checks import at_least
from verl_sft.config.train import TrainConfig


@dataclass
class PlanConfig(TrainConfig):
    """`verl-sft plan`: how many steps, how full, how balanced, how much memory?"""

    world_size: int | None = None  # ranks to plan for; default: as train would start
    json: str | None = None  # file for the same figures as JSON

    def __post_init__(self) -> None:
        if self.world_size is not None:
            at_least("world_size", self.world_size, 1)
