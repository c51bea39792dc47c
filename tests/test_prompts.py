"""Prompts, answers, and the action parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_sft.prompts.alfworld import ADD_WM1, ADD_WM2, COMPACT, DEFAULT, shorten_observation
from verl_sft.prompts.base import PromptTemplate, answer_text
from verl_sft.types import Answer, Message, Observation, Step

TEMPLATES = (DEFAULT, ADD_WM1, ADD_WM2, COMPACT)
ACTIONS = ("go to fridge 1", "look", "take apple 1 from shelf 1")
# Prose as an expert writes it: no tags of its own.
PROSE = st.text(st.characters(codec="ascii", exclude_characters="<>\x00"), max_size=40)


def make_step(index: int, action: str = "look", valid: bool = True) -> Step:
    seen = Observation(f"observation {index}", "put a apple in fridge.", ACTIONS)
    prompt = DEFAULT.windowed(seen, (), history_length=2)
    response = Message("assistant", f"<think>t{index}</think>\n<action>{action}</action>")
    return Step(index, seen, prompt, response, action, valid, f"observation {index + 1}", 0.0,
                False, False)  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@given(thought=PROSE, prediction=PROSE, action=st.sampled_from(ACTIONS))
def test_format_and_parse_are_inverse(
    template: PromptTemplate, thought: str, prediction: str, action: str
) -> None:
    """What an expert formats, the parser reads back as a valid action."""
    text = template.format(Answer(action, thought, "seen", prediction))
    parsed = template.parse(text, ACTIONS)
    assert (parsed.action, parsed.valid, parsed.reason) == (action, True, "")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_every_required_tag_is_required(template: PromptTemplate) -> None:
    """Without any one of its tags an answer is invalid, and the reason names the tag."""
    whole = template.format(Answer("look", "a", "b", "c"))
    for tag in template.tags:
        parsed = template.parse(whole.replace(f"<{tag}>", ""), ACTIONS)
        assert not parsed.valid
        assert tag in parsed.reason


def test_tag_order_matters() -> None:
    """An action before the thought was not thought about."""
    parsed = DEFAULT.parse("<action>look</action><think>why</think>", ACTIONS)
    assert not parsed.valid


@pytest.mark.parametrize(
    ("text", "action", "reason"),
    [
        ("I would rather go to the fridge at once", "rather go to the fridge at once"[-30:],
         "no <action>"),
        ("<think>x</think><action>fly</action>", "fly", "not admissible"),
        ("<think>x</think><action>look</action>", "look", ""),
        ("<THINK>x</THINK><ACTION>LOOK</ACTION>", "look", ""),
        ("<think>x</think><action> go  to\nfridge 1 </action>", "go to fridge 1", ""),
        ("<think>\u6211</think><action>look</action>", "look", "English"),
    ],
)  # fmt: skip
def test_invalid_answers_reach_the_environment_as_described(
    text: str, action: str, reason: str
) -> None:
    """A missing action falls back to the last 30 characters; every other answer is taken as is."""
    parsed = DEFAULT.parse(text, ACTIONS)
    assert parsed.action.endswith(action)
    assert parsed.valid == (not reason)
    assert reason in parsed.reason


def test_windowed_prompt_quotes_the_last_steps_with_their_numbers() -> None:
    """Two steps of history: the last two, true numbers, each observation with what was done."""
    steps = [make_step(i, f"go to fridge {i}") for i in range(4)]
    now = Observation("now", "put a apple in fridge.", ACTIONS)
    (message,) = DEFAULT.windowed(now, steps, history_length=2)
    text = message.content
    assert isinstance(text, str)
    assert "[Observation 3: 'observation 2', Action 3: 'go to fridge 2']" in text
    assert "[Observation 4: 'observation 3', Action 4: 'go to fridge 3']" in text
    assert "Observation 2:" not in text
    assert "taken 4 step(s)" in text and "at step 5" in text
    assert "['go to fridge 1',\n 'look',\n 'take apple 1 from shelf 1']" in text


def test_dialogue_is_a_prefix_of_the_next_dialogue() -> None:
    """Each step only appends: the chat that a policy sees is never rewritten."""
    steps = [make_step(i) for i in range(3)]
    longer = DEFAULT.dialogue(steps[2].observation, steps[:2])
    shorter = DEFAULT.dialogue(steps[1].observation, steps[:1])
    assert longer[: len(shorter)] == shorter
    assert [m.role for m in longer] == ["user", "assistant", "user", "assistant", "user"]


def test_reasoning_that_a_server_returns_apart_counts() -> None:
    """`reasoning_content` is the thought; without it the same answer has none."""
    content = "<action>look</action>"
    assert DEFAULT.parse(answer_text(Message("assistant", content, "why")), ACTIONS).valid
    assert not DEFAULT.parse(answer_text(Message("assistant", content)), ACTIONS).valid


def test_short_observation_is_short() -> None:
    """The preamble goes, a long list is cut at a comma."""
    text = "You arrive at loc 3. On shelf 1, you see " + ", ".join(f"cd {i}" for i in range(99))
    short = shorten_observation(text)
    assert short.startswith("On shelf 1") and len(short) < 250 and short.endswith(", ...")
