"""The values that pass between an environment, a policy, the rollout and the records.

Everything here is frozen, needs only the standard library and round-trips through plain JSON
(`to_json` / `from_json`), so that raw episodes can be rebuilt into rows in any other form later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

JSON = dict[str, Any]


class StopReason(StrEnum):
    """Why an episode ended."""

    TERMINATED = "terminated"  # the environment reached an end state, won or lost
    TRUNCATED = "truncated"  # the environment's own limit
    MAX_STEPS = "max_steps"  # `rollout.max_steps`
    INVALID = "invalid"  # `rollout.max_invalid` invalid answers in a row
    ENV_ERROR = "env_error"  # reset or step raised, crashed or hung
    POLICY_ERROR = "policy_error"  # no usable completion after all retries
    ABORTED = "aborted"  # the run was told to stop


class HistoryStyle(StrEnum):
    """How the past reaches the policy."""

    WINDOWED = "windowed"  # one user message per step that quotes the last few steps
    DIALOGUE = "dialogue"  # the real chat: one user and one assistant message per step


@dataclass(frozen=True, slots=True)
class Message:
    """One OpenAI chat message. `content` is text, or a list of content parts."""

    role: str
    content: str | tuple[JSON, ...] | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[JSON, ...] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def to_json(self) -> JSON:
        """The message as a dict without the fields that are not set (`content` is always there)."""
        row: JSON = {"role": self.role, "content": _plain(self.content)}
        for key in ("reasoning_content", "tool_calls", "tool_call_id", "name"):
            value = getattr(self, key)
            if value is not None:
                row[key] = _plain(value)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Message:
        """The inverse of `to_json`; keys that are not message fields are ignored."""
        known = {name: row[name] for name in _MESSAGE_FIELDS if row.get(name) is not None}
        for key in ("content", "tool_calls"):
            if isinstance(known.get(key), list):
                known[key] = tuple(known[key])
        return cls(**known)


_MESSAGE_FIELDS = tuple(f.name for f in fields(Message))


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment shows before an action is chosen.

    `task` is the goal as text, the same at every step. `expert_action` is hidden knowledge: the
    next action of the environment's own plan, shown to no policy but the planner.
    """

    text: str
    task: str = ""
    admissible_actions: tuple[str, ...] = ()
    expert_action: str | None = None
    tools: tuple[JSON, ...] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The Gymnasium contract. `info["success"]` (bool) says whether the task is solved."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of an answer before a prompt template gives them its tags."""

    action: str
    thought: str = ""
    observation: str = ""
    prediction: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a policy returns for one request: finished text, or an expert's draft.

    A `draft` is formatted by the rollout with the template of the run once the next observation is
    known (the expert's prediction is the true one). `weight` 0 keeps the turn as context only.
    `error` ends this one episode (a prompt that is too long, say) and leaves its siblings alone.
    """

    message: Message | None = None
    draft: Answer | None = None
    weight: float = 1.0
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What the action parser read out of an answer.

    `valid` means that all required tags were there and the action was admissible; else `reason`
    says what was wrong and `action` is the fallback that goes to the environment.
    """

    action: str
    valid: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One interaction: what the policy saw, what it said, what followed.

    `prompt` is what was new to the policy: the whole windowed prompt, or the one message that a
    dialogue grew by (the chat before it is the `prompt` and `response` of the earlier steps).
    """

    index: int
    observation: Observation
    prompt: tuple[Message, ...]
    response: Message
    action: str
    action_valid: bool
    next_observation: str
    reward: float
    terminated: bool
    truncated: bool
    weight: float = 1.0
    invalid_reason: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> JSON:
        """A JSON object with one key per field."""
        row: JSON = {f.name: getattr(self, f.name) for f in fields(self)}
        row["observation"] = {
            f.name: _plain(getattr(self.observation, f.name)) for f in fields(Observation)
        }
        row["prompt"] = [m.to_json() for m in self.prompt]
        row["response"] = self.response.to_json()
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Step:
        """The inverse of `to_json`."""
        seen = dict(row["observation"])
        seen["admissible_actions"] = tuple(seen["admissible_actions"])
        if seen.get("tools") is not None:
            seen["tools"] = tuple(seen["tools"])
        known = {f.name: row[f.name] for f in fields(cls) if f.name in row}
        known["observation"] = Observation(**seen)
        known["prompt"] = tuple(Message.from_json(m) for m in row["prompt"])
        known["response"] = Message.from_json(row["response"])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Episode:
    """One attempt at one task: lossless, so that every row can be rebuilt from it.

    `episode_id` is a hash of environment, task, seed, attempt, policy and prompt; `seed` is the
    episode's own. Durations are not stored: the same seed gives the same bytes.
    """

    episode_id: str
    env_name: str
    task_id: str
    task_type: str
    split: str
    seed: int
    attempt: int
    policy_name: str
    prompt_template: str
    history_style: HistoryStyle
    history_length: int
    steps: tuple[Step, ...]
    stop_reason: StopReason
    success: bool
    reward: float
    error: str = ""
    agent_name: str = "agent"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> JSON:
        """A JSON object with one key per field."""
        row: JSON = {f.name: getattr(self, f.name) for f in fields(self)}
        row["history_style"] = str(self.history_style)
        row["stop_reason"] = str(self.stop_reason)
        row["steps"] = [s.to_json() for s in self.steps]
        row["meta"] = dict(self.meta)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Episode:
        """The inverse of `to_json`."""
        known = {f.name: row[f.name] for f in fields(cls) if f.name in row}
        known["history_style"] = HistoryStyle(row["history_style"])
        known["stop_reason"] = StopReason(row["stop_reason"])
        known["steps"] = tuple(Step.from_json(s) for s in row["steps"])
        return cls(**known)


def _plain(value: Any) -> Any:
    """Tuples become lists, so that equal values give equal JSON."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(v) for v in value]
    return value
