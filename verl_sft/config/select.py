"""Which records are kept, in the same words for `convert` and `stats`."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl_sft.config.checks import at_least, one_of


@dataclass
class SelectConfig:
    """Filters on records; every record that is left out is counted by reason."""

    require_success: bool = False  # records of episodes that are known to have succeeded
    require_agent_success: bool = False  # the same by the agent's own flag
    min_reward: float | None = None
    min_turns: int = 0  # answers in the conversation
    max_turns: int | None = None
    max_chars: int | None = None  # of all messages together
    end_marker: str | None = None  # text that the last message must hold
    valid_actions: bool = False  # records whose own action was valid
    task_types: list[str] = field(default_factory=list)  # empty: all
    agents: list[str] = field(default_factory=list)  # empty: all
    statuses: list[str] = field(default_factory=list)  # of `meta.status`; empty: all
    where: str | None = None  # an SQL condition on the columns: reward > 0.5 AND turns < 9
    balance: str | None = None  # agent_name | task_type | data_source: as many of each

    def __post_init__(self) -> None:
        at_least("select.min_turns", self.min_turns, 0)
        for key in ("max_turns", "max_chars"):
            if getattr(self, key) is not None:
                at_least(f"select.{key}", getattr(self, key), 1)
        if self.balance is not None:
            one_of("select.balance", self.balance, ("agent_name", "task_type", "data_source"))
