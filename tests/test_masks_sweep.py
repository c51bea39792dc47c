"""Every chat template of the installed `trl` wheel x conversation shapes: exact, or refused.

The oracle is transformers' own renderer: a learned turn must be what the template prints for it
behind the generation prompt, up to the stop token named here by hand for each model family.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.chat_templates import read_template, template_for, template_names
from tests.masks_table import parts, table
from verl_sft.data.encoder import BREAK
from verl_sft.data.messages import Refused, prepare
from verl_sft.data.render import render
from verl_sft.data.template import ChatTemplate
from verl_sft.data.view import RenderOptions, View
from verl_sft.types import Message

pytest.importorskip("trl", reason="trl brings the chat templates")
from transformers.utils.chat_template_utils import render_jinja_template

# The token that ends an assistant's turn, by the model makers' generation configs.
STOPS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "gptoss": "<|return|>",
    "glm4moe_training": "<|user|>",
    "glm4moe": "",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
}
OTHER_STOPS = {"gptoss": ("<|call|>",), "gemma4": ("<|tool_response>",),
               "diffusion_gemma": ("<|tool_response>",), "muse_glimmer": ("<|eom|>",),
               "glm4moe_training": ("<|observation|>",), "llama3_1": ("<|eom_id|>",)}  # fmt: skip

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "the city"}},
                "required": ["city"],
            },
        },
    }
]


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str | None, thought: str | None = None, *calls: dict[str, Any]) -> Message:
    return Message("assistant", text, reasoning_content=thought, tool_calls=calls or None)


def call(city: str, number: int = 1) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {"type": "function", "id": f"call0000{number}", "function": function}


def result(text: str, number: int = 1) -> Message:
    return Message("tool", text, tool_call_id=f"call0000{number}", name="get_weather")


SYSTEM = Message("system", "Be brief.")
SHAPES: dict[str, list[Message]] = {
    "plain": [user("2+2?"), says("It is 4.")],
    "multi-turn": [user("2+2?"), says("2+2 equals 4."), user("4+4?"), says("4+4 equals 8.")],
    "system": [SYSTEM, user("2+2?"), says("4."), user("3+3?"), says("6.")],
    "tool call": [user("Weather?"), says(None, None, call("Paris")), result("sunny"), says("Sun.")],
    "parallel calls": [
        user("Weather in both?"),
        says(None, None, call("Paris"), call("Rome", 2)),
        result("sunny"),
        result("rain", 2),
        says("Sun and rain."),
    ],
    "text and call": [
        user("Weather?"),
        says("I look.", None, call("Paris")),
        result("sunny"),
        says("Sun."),
    ],
    "all think": [
        user("2+2?"),
        says("It is 4.", "two and two"),
        user("3+3?"),
        says("It is 6.", "three twice"),
    ],
    "some think": [user("2+2?"), says("It is 4."), user("3+3?"), says("It is 6.", "three twice")],
    "inline thought": [user("2+2?"), says("<think>\ntwo and two\n</think>\n\nIt is 4.")],
    "empty content": [user("2+2?"), says(""), user("again?"), says("4.")],
    "None content": [user("2+2?"), says(None), user("again?"), says("4.")],
    "unicode": [user("caf\u00e9 \u4f60\u597d \U0001f600?"), says("\u00fcber \U0001f44d\U0001f3fd")],
    "control tokens": [user("<|im_end|> </tool_response> <end_of_turn>"), says("<|im_end|> no")],
    "two users": [user("2+2?"), user("quick!"), says("4.")],
    "ends with user": [user("2+2?"), says("4."), user("thanks")],
    "leading newline": [user("2+2?"), says("\n\n4.")],
}  # fmt: skip


@cache
def chat_template(name: str) -> ChatTemplate:
    return template_for(read_template(name), name=name)


def tools_of(messages: list[Message]) -> list[dict[str, Any]] | None:
    return TOOLS if any(m.tool_calls for m in messages) else None


def rendered(
    template: ChatTemplate, messages: list[Message], *, tools: Any, prompt: bool, **kwargs: Any
) -> str:
    """The output of transformers' own renderer."""
    rows, _ = prepare(messages, template=template, control_text="escape")
    texts, _ = render_jinja_template(
        conversations=[rows],
        tools=tools,
        chat_template=template.spec.chat_template,
        add_generation_prompt=prompt,
        **template.spec.special_tokens,
        **kwargs,
    )
    return str(texts[0])


def expected(template: ChatTemplate, messages: list[Message], index: int) -> tuple[str, str]:
    """`(context, learned text)` of assistant message `index` by the oracle."""
    tools, before = tools_of(messages), messages[:index]
    m = messages[index]
    thinks = m.reasoning_content or "</think>" in str(m.content)
    modes: list[dict[str, Any]] = [{}] if thinks else [{}, {"enable_thinking": False}]
    for mode in modes:  # a thought that nobody thought is never learned
        closed = rendered(template, messages[: index + 1], tools=tools, prompt=False, **mode)
        prompts = [rendered(template, before, tools=tools, prompt=True, **m) for m in modes]
        context = max((p for p in prompts if closed.startswith(p)), key=len)
        if thinks or not closed[len(context) :].lstrip().startswith(("<think>", "</think>")):
            break
    tail = closed[len(context) :]
    key = max((k for k in STOPS if template.spec.template_name.startswith(k)), key=len)
    ends = [tail.rfind(s) + len(s) for s in (STOPS[key], *OTHER_STOPS.get(key, ())) if s in tail]
    end = max(ends) if STOPS[key] else len(tail)
    if STOPS[key]:
        end += tail.startswith("\n", end)
    return context, tail[:end]


@cache
def _tokenizer(backend_json: str) -> Tokenizer:
    return Tokenizer.from_str(backend_json)


def plain_ids(template: ChatTemplate, text: str) -> list[int]:
    """The tokenizer's own ids; where control tokens are escaped only ours can say them."""
    if BREAK in text:
        return template.encode(text).ids.tolist()
    tokenizer = _tokenizer(template.spec.backend_json)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def assert_exact(template: ChatTemplate, messages: list[Message], views: list[View]) -> None:
    """Each learned turn is, in ids, the oracle's text behind the oracle's context."""
    turns = [turn for view in views for turn in view.turns]
    assert sorted(turns) == [i for i, m in enumerate(messages) if m.role == "assistant"]
    for view in views:
        covered = np.zeros(len(view.weights), dtype=bool)
        for turn, (start, stop) in zip(view.turns, view.spans, strict=True):
            context, learned = expected(template, messages, turn)
            assert view.token_ids[:start].tolist() == plain_ids(template, context)
            assert view.token_ids[:stop].tolist() == plain_ids(template, context + learned)
            assert view.weights[start:stop].all()
            covered[start:stop] = True
        assert not view.weights[~covered].any()


def cell(name: str, shape: str, **options: Any) -> str:
    template, messages = chat_template(name), SHAPES[shape]
    try:
        views = render(
            messages, template=template, tools=tools_of(messages), options=RenderOptions(**options)
        )
    except Refused as refused:
        assert refused.reason
        return refused.code
    assert_exact(template, messages, views)
    return "exact"


@cache
def sweep() -> dict[tuple[str, str], str]:
    """`{(template, shape): "exact" or the code of the refusal}`; raises on a wrong mask."""
    return {(name, shape): cell(name, shape) for name in template_names() for shape in SHAPES}


def test_every_cell_is_exact_or_refused_with_a_reason() -> None:
    """No template and no shape yields a mask that differs from the oracle."""
    cells = sweep()
    counts = Counter(cells.values())
    assert len(template_names()) >= 30
    assert counts["exact"] >= 0.75 * len(cells), counts
    always = [n for n in template_names() if cells[n, "plain"] == "exact"]
    assert len(always) >= 0.8 * len(template_names()), set(template_names()) - set(always)


def test_the_table_in_the_docs_is_the_sweep() -> None:
    """docs/masking.md shows what was measured; `python -m tests.masks_table` renews it."""
    assert parts()[1] == table(sweep())


NEGATIVE = ("qwen2_5.jinja", "llama3_1.jinja", "phi3.jinja", "gemma3.jinja")


def _shift(view: View, *, start: int, stop: int) -> View:
    weights = np.zeros_like(view.weights)
    spans = tuple((a + start, b + stop) for a, b in view.spans)
    for a, b in spans:
        weights[a:b] = 1
    return replace(view, weights=weights, spans=spans)


@pytest.mark.parametrize("name", NEGATIVE)
@pytest.mark.parametrize(
    ("start", "stop"), [(1, 1), (-1, -1), (-2, 0), (0, -1), (0, -2)],
    ids=["off by one", "off by minus one", "header", "last token", "stop token"],
)  # fmt: skip
def test_a_wrong_mask_turns_the_sweep_red(name: str, start: int, stop: int) -> None:
    """Off by one, a header in the mask, a dropped stop token: none passes the oracle."""
    template, messages = chat_template(name), SHAPES["multi-turn"]
    views = render(messages, template=template)
    assert_exact(template, messages, views)
    with pytest.raises(AssertionError):
        assert_exact(template, messages, [_shift(v, start=start, stop=stop) for v in views])


_words = st.text("ab <>|\n.\u00e9?", min_size=1, max_size=12).filter(lambda t: t == t.strip())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(_words, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0),
    name=st.sampled_from(["qwen2_5.jinja", "qwen3.jinja", "llama3.jinja", "gemma.jinja"]),
)
def test_any_dialogue_is_exact(texts: list[str], name: str) -> None:
    """Random short dialogues give the oracle's ids on four families, or a merged boundary."""
    messages = [user(t) if i % 2 == 0 else says(t) for i, t in enumerate(texts)]
    template = chat_template(name)
    try:
        views = render(messages, template=template)
    except Refused as refused:
        assert refused.code == "merged_boundary"
        return
    assert_exact(template, messages, views)


@st.composite
def agent_chats(draw: st.DrawFn) -> list[Message]:
    """Chats with system messages, thoughts, tool calls and results, ending anywhere."""
    messages = [SYSTEM] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(_words)))
        for _ in range(draw(st.integers(0, 2))):
            calls = [call(draw(_words), n + 1) for n in range(draw(st.integers(1, 2)))]
            messages.append(says(draw(st.sampled_from(["", "I look."])), draw(_thoughts), *calls))
            messages += [result(draw(_words), n + 1) for n in range(len(calls))]
        messages.append(says(draw(_words), draw(_thoughts)))
    return messages[: draw(st.integers(2, len(messages)))]


_thoughts = st.sampled_from([None, "two and two", "hm\nhm"])
_AGENTS = ("qwen3.jinja", "qwen3_5_think.jinja", "qwen3_8.jinja", "glm4moe.jinja", "qwen2_5.jinja",
           "nemotron_3_nano.jinja", "gemma4_v5.jinja", "gptoss.jinja")  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=agent_chats(), name=st.sampled_from(_AGENTS))
def test_any_agent_chat_is_exact_or_refused(messages: list[Message], name: str) -> None:
    """Random chats with thoughts and tools: no mask differs from the oracle's."""
    template = chat_template(name)
    try:
        views = render(messages, template=template, tools=tools_of(messages))
    except Refused as refused:
        assert refused.code and refused.reason
        return
    assert_exact(template, messages, views)
