"""The ALFWorld prompts: plain reasoning, two that also model the world, and a compact one."""

from __future__ import annotations

import re

from verl_sft.prompts.base import PromptTemplate

MAX_SHORT_CHARS = 240

_ROLE = "You are an agent that solves household tasks in the ALFRED text environment."
_STATE = (
    "Your task is to: {task}\n"
    "Your current observation is: {observation}\n"
    "Your admissible actions now are: {actions}.\n"
)
_STATE_WITH_HISTORY = (
    "Your task is to: {task}\n"
    "So far you have taken {step_count} step(s). The last {history_length} of them, each with what "
    "you observed and what you did:\n{history}\n"
    "You are now at step {current_step} and your current observation is: {observation}\n"
    "Your admissible actions now are: {actions}.\n"
)
_TURN = "{observation}\nAdmissible actions: {actions}."
_THINK = "First reason step by step about the situation inside <think> </think>.\n"
_OBSERVE = (
    "Then describe inside <observation> </observation> only what is visible now: facts, no guesses "
    "and no plans.\n"
)
_PREDICT = (
    "Then give inside <prediction> </prediction> a concise description of the next observation "
    "that you expect: where you will be, which objects change, what becomes visible.\n"
)
_ACT = "Last, choose one admissible action and put it inside <action> </action>."


def shorten_observation(text: str) -> str:
    """An ALFWorld observation without its preamble, at most 240 characters.

    >>> shorten_observation("You arrive at loc 30. On shelf 1, you see cd 1, and pen 2.")
    'On shelf 1, you see cd 1, and pen 2.'
    """
    short = " ".join(text.split())
    short = re.sub(r"^You arrive at [^.]*\.\s+", "", short)
    if len(short) <= MAX_SHORT_CHARS:
        return short
    return short[:MAX_SHORT_CHARS].rsplit(",", 1)[0] + ", ..."


def _template(name: str, tags: tuple[str, ...], rules: str) -> PromptTemplate:
    return PromptTemplate(
        name=name,
        version="1",
        tags=tags,
        opening=f"{_ROLE}\n{_STATE}\nIt is your turn to act.\n{rules}",
        with_history=f"{_ROLE}\n{_STATE_WITH_HISTORY}\nIt is your turn to act.\n{rules}",
        first_turn=f"{_ROLE}\n{rules}\n\nYour task is to: {{task}}\n{_TURN}",
        next_turn=_TURN,
        shorten=shorten_observation,
    )


DEFAULT = _template("default", ("think", "action"), _THINK + _ACT)
ADD_WM1 = _template("add_wm1", ("think", "prediction", "action"), _THINK + _PREDICT + _ACT)
ADD_WM2 = _template(
    "add_wm2", ("think", "observation", "prediction", "action"), _THINK + _OBSERVE + _PREDICT + _ACT
)

# For small models: without rules and lists of actions a dialogue has less than half the tokens.
COMPACT = PromptTemplate(
    name="compact",
    version="1",
    tags=("think", "action"),
    opening="Task: {task}\n{observation}",
    with_history="Task: {task}\nSo far:\n{history}\n{observation}",
    first_turn="Task: {task}\n{observation}",
    next_turn="{observation}",
    shorten=shorten_observation,
)
