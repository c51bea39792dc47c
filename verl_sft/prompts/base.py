"""The prompt seam: what a policy is shown, which tags its answer must hold, how it is read.

A template turns observations into messages (`windowed` or `dialogue`), an expert's `Answer` into
text (`format`) and text into an action (`parse`). `format` and `parse` are inverse, so that expert
data and model data have one form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from verl_sft.types import Answer, Message, Observation, ParsedAction, Step

FALLBACK_CHARS = 30  # an unreadable answer goes to the environment as its last 30 characters
_CJK = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One way of asking for an action.

    Attributes:
        name: the registry's name.
        version: changes whenever the wording does; stored with every row.
        tags: the required tags in order; `action` is always among them.
        opening: text of a prompt without history; slots `{task}`, `{observation}`, `{actions}`.
        with_history: the same with history; also `{step_count}`, `{history_length}`, `{history}`,
            `{current_step}`.
        first_turn: first user message of a dialogue; slots as in `opening`.
        next_turn: the later user messages; slots `{observation}`, `{actions}`.
        shorten: an observation in the short form used by `<observation>` and `<prediction>`.
    """

    name: str
    version: str
    tags: tuple[str, ...]
    opening: str
    with_history: str
    first_turn: str
    next_turn: str
    shorten: Callable[[str], str]

    @property
    def label(self) -> str:
        """Name and version as they stand in the rows."""
        return f"{self.name}@{self.version}"

    def windowed(
        self, observation: Observation, steps: Sequence[Step], *, history_length: int
    ) -> tuple[Message, ...]:
        """One user message that quotes the last `history_length` steps."""
        slots = {
            "task": observation.task,
            "observation": observation.text,
            "actions": quoted_actions(observation.admissible_actions),
        }
        recent = steps[max(0, len(steps) - history_length) :]
        if not recent:
            return (Message("user", self.opening.format(**slots)),)
        history = "\n".join(
            f"[Observation {n + 1}: '{step.observation.text}', Action {n + 1}: '{step.action}']"
            for n, step in ((step.index, step) for step in recent)
        )
        text = self.with_history.format(
            **slots,
            step_count=len(steps),
            history_length=len(recent),
            history=history,
            current_step=len(steps) + 1,
        )
        return (Message("user", text),)

    def dialogue(self, observation: Observation, steps: Sequence[Step]) -> tuple[Message, ...]:
        """The whole chat so far, ending with the user message for `observation`."""
        messages: list[Message] = []
        for step in steps:
            messages += (self._turn(step.observation, len(messages) == 0), step.response)
        messages.append(self._turn(observation, len(messages) == 0))
        return tuple(messages)

    def format(self, answer: Answer) -> str:
        """An answer with this template's tags, each on its own line."""
        parts = {
            "think": answer.thought,
            "observation": answer.observation,
            "prediction": answer.prediction,
            "action": answer.action,
        }
        return "\n".join(f"<{tag}>{parts[tag]}</{tag}>" for tag in self.tags)

    def parse(self, text: str, admissible_actions: Sequence[str]) -> ParsedAction:
        """Read the action; the result says whether the answer was valid, and if not, why.

        An answer without an action tag goes to the environment as its last 30 characters, as the
        prompts' origin does it, so that environments see the same fallback.
        """
        lowered = text.lower()
        found = re.search(r"<action>(.*?)</action>", lowered, re.DOTALL)
        if found is None:
            return ParsedAction(lowered[-FALLBACK_CHARS:], False, "no <action>...</action>")
        action = " ".join(found.group(1).split())
        reason = self._missing_tag(lowered)
        if not reason and _CJK.search(text):
            reason = "the answer is not in English"
        if not reason and admissible_actions and action not in admissible_actions:
            reason = "the action is not admissible"
        return ParsedAction(action, not reason, reason)

    def _missing_tag(self, lowered: str) -> str:
        position = 0
        for tag in self.tags:
            found = re.compile(rf"<{tag}>.*?</{tag}>", re.DOTALL).search(lowered, position)
            if found is None:
                return f"no <{tag}>...</{tag}> in its place"
            position = found.end()
        return ""

    def _turn(self, observation: Observation, first: bool) -> Message:
        text = (self.first_turn if first else self.next_turn).format(
            task=observation.task,
            observation=observation.text,
            actions=", ".join(observation.admissible_actions),
        )
        return Message("user", text)


def quoted_actions(actions: Sequence[str]) -> str:
    """The admissible actions as a windowed prompt lists them (a dialogue spends fewer tokens)."""
    return "[" + ",\n ".join(f"'{action}'" for action in actions) + "]"


def answer_text(message: Message) -> str:
    """What a message says, with reasoning that a server returned apart put back in its tags."""
    content = message.content if isinstance(message.content, str) else ""
    if message.reasoning_content:
        return f"<think>{message.reasoning_content}</think>\n{content}"
    return content
