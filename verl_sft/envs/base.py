"""The environment seam: what the rollout needs from an environment, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from verl_sft.types import Observation, StepResult


class Environment(Protocol):
    """One instance plays one episode at a time, in one worker; limits are the rollout's affair."""

    name: str

    def task_ids(self, split: str) -> Sequence[str]:
        """Every task of a split, in a stable order; an id replays its task on any machine.

        Raises:
            InputError: the split has no tasks, with what was looked for and where.
        """
        ...

    def task_type(self, task_id: str) -> str:
        """The kind of task, by which results are grouped."""
        ...

    def reset(self, task_id: str, *, seed: int) -> Observation:
        """Start the task.

        Raises:
            InputError: the task is broken or unsolvable; the rollout records it and goes on.
        """
        ...

    def step(self, action: str) -> StepResult:
        """Do `action`; `info["success"]` says whether the task is solved."""
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...
