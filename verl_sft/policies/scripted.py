"""A policy that answers from a list: for tests, and for replaying what somebody else decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_sft.config.collect import PolicyConfig
from verl_sft.policies.base import PolicyRequest
from verl_sft.types import Completion, Message


@dataclass(frozen=True, slots=True)
class Scripted:
    """Answers step `i` of every episode with `answers[i]`, and the last one from then on."""

    answers: tuple[str, ...]
    name: str = "scripted"

    def complete(self, requests: Sequence[PolicyRequest]) -> list[Completion]:
        """The scripted answers."""
        return [
            Completion(Message("assistant", self.answers[min(len(r.steps), len(self.answers) - 1)]))
            for r in requests
        ]


def make_scripted(config: PolicyConfig) -> Scripted:
    """A policy that always looks around; a baseline that never wins."""
    return Scripted(("<think>I look around.</think>\n<action>look</action>",))
