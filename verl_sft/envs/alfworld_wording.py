"""Grammar and domain of generated games: the wheel's own, or in the wording of 2.1.1."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from verl_sft.envs.alfworld_engine import import_alfworld
from verl_sft.errors import UsageError

_GOAL_SLOT = "UNKNOWN GOAL"
# What turns the shipped grammar (2.1.2: "move X to Y", with articles) into that of the public
# games (2.1.1: "put X in/on Y", without). Order matters; each must find something to change.
_TO_2_1_1: tuple[tuple[str, str], ...] = (
    (r'"You arrive at \{r\.name\}', '"You arrive at {lend.name}'),
    (r"You are facing the \[\{r\.name \|", "You are facing [{#overview_with_state(r)# |"),
    (r"The \{r\.name\} is open\. In it, you see", "In {r.name}, you see"),
    (r"The \{r\.name\} is closed", "{r.name} is closed"),
    (r"You move the \{o\.name\} to the \{r\.name\}", "You put {o.name} in/on {r.name}"),
    (r"move \{o\} to \{r\}", "put {o} in/on {r}"),
    (r"move \(object\) to \(receptacle\):  place", "put (object) in/on (receptacle): place"),
    (r"You pick up", "You take"),
    (r"\{(\w+)\.indefinite \+ ' ' \+ ", r"{"),
    (r"\{(\w+)\.indefinite\} ", ""),
    (r"\bthe \{", "{"),
    (r"\(in/on \{r\.name\}\)\}", "(in/on {r.name})"),
    (r"\(it is (open|closed)\)", r"(is \1)"),
)


@functools.cache
def domain() -> str:
    """The PDDL domain that the wheel ships."""
    return _shipped("ALFRED_PDDL_PATH")


@functools.cache
def grammar(wording: str) -> str:
    """The text grammar, with a slot for the task.

    Args:
        wording: "2.1.2" (as shipped) or "2.1.1".

    Raises:
        UsageError: the installed `alfworld` ships a grammar that cannot be put into that wording.
    """
    text = _shipped("ALFRED_TWL2_PATH")
    if wording == "2.1.1":
        for pattern, replacement in _TO_2_1_1:
            text, count = re.subn(pattern, replacement, text)
            if not count:
                raise UsageError(
                    "wording=2.1.1 is not possible with the installed alfworld",
                    why=f"Its grammar has no text like {pattern}",
                    fix="Use wording=2.1.2, or install alfworld 0.4.2",
                )
    return text


def with_task(text: str, task: str) -> str:
    """The grammar with the task filled in."""
    assert _GOAL_SLOT in text
    return text.replace(_GOAL_SLOT, task)


def _shipped(name: str) -> str:
    return Path(getattr(import_alfworld("alfworld.info"), name)).read_text(encoding="utf-8")
