"""Records as hypothesis makes them: whole chats with tools, thoughts and every kept column."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=()), max_size=10)
F32 = st.floats(0, 100, width=32)
ARGUMENTS = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers(0, 9) | TEXT, max_size=2)
NAMES = st.none() | TEXT
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT})}
)


@st.composite
def calls(draw: Any) -> tuple[Any, ...]:
    """One or two well-formed tool calls."""
    names = draw(st.lists(TEXT.filter(bool), min_size=1, max_size=2))
    return tuple(
        {
            "id": "c",
            "type": "function",
            "function": {"name": name, "arguments": draw(ARGUMENTS)},
        }
        for name in names
    )


ANSWERS = st.builds(
    Message,
    role=st.just("assistant"),
    content=TEXT,
    reasoning_content=st.none() | TEXT.filter(bool),
    tool_calls=st.none() | calls(),
) | st.builds(Message, role=st.just("assistant"), content=st.none(), tool_calls=calls())
RESULTS = st.builds(
    Message, role=st.just("tool"), content=TEXT, tool_call_id=st.none() | st.just("c"), name=NAMES
)
SYSTEMS = st.builds(Message, role=st.just("system"), content=TEXT)
USERS = st.builds(Message, role=st.just("user"), content=TEXT)


@st.composite
def records(draw: Any, *, alternating: bool = False) -> SFTRecord:
    """A record; `alternating`: one question before each answer, no empty system text."""
    messages = draw(st.lists(SYSTEMS.filter(lambda m: m.content or not alternating), max_size=1))
    messages += [draw(USERS), draw(ANSWERS)]
    for _ in range(draw(st.integers(0, 2))):
        messages.append(draw(USERS | RESULTS))
        if not alternating:
            messages += draw(st.lists(USERS | RESULTS | ANSWERS, max_size=2))
        messages.append(draw(ANSWERS))
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    supervise = draw(
        st.none() | st.lists(st.sampled_from(answers), min_size=1, unique=True).map(sorted)
    )
    weights = None
    if supervise is not None and draw(st.booleans()):
        weights = tuple(draw(F32) for _ in supervise)
    return SFTRecord(
        messages=tuple(messages),
        supervise=None if supervise is None else tuple(supervise),
        weights=weights,
        tools=draw(st.none() | st.lists(TOOL, min_size=1, max_size=2).map(tuple)),
        record_id=draw(TEXT),
        group_id=draw(TEXT),
        episode_id=draw(TEXT),
        step=draw(st.integers(0, 9)),
        sample_weight=draw(F32),
        success=draw(st.none() | st.booleans()),
        reward=draw(st.none() | F32),
        task_type=draw(TEXT),
        agent_name=draw(TEXT),
        turn_idx=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 2**40)),
        extra_info=draw(ARGUMENTS),
        meta=draw(ARGUMENTS),
    )
