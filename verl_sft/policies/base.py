"""The policy seam: requests in, completions out, batched; an expert is a policy like a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from verl_sft.prompts.base import PromptTemplate
from verl_sft.types import Completion, Message, Observation, Step


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """One decision to take.

    `messages` is what a model sees. `observation` and `steps` are the same facts in structure,
    for experts; `seed` is the episode's, so that a decision is a pure function of its request.
    """

    episode_id: str
    seed: int
    messages: tuple[Message, ...]
    observation: Observation
    steps: tuple[Step, ...]
    template: PromptTemplate


class Policy(Protocol):
    """Who plays."""

    name: str

    def complete(self, requests: Sequence[PolicyRequest]) -> list[Completion]:
        """One completion per request, in order."""
        ...
