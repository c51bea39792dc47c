"""Masks of single conversations: weights, views, truncation, escapes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.chat_templates import byte_level_bpe, read_template, template_for
from verl_sft.data.messages import Refused
from verl_sft.data.render import render
from verl_sft.data.template import ChatTemplate, TokenizerSpec
from verl_sft.data.tokenizer import chatml, tokenizer_spec
from verl_sft.data.view import RenderOptions, View
from verl_sft.errors import UsageError
from verl_sft.prompts.alfworld import ADD_WM2, DEFAULT
from verl_sft.prompts.base import PromptTemplate
from verl_sft.types import Answer, Message, Observation, Step

CHATML = template_for(chatml(), name="chatml")
QWEN3 = template_for(read_template("qwen3.jinja"), name="qwen3")


def chat(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[i % 2], text) for i, text in enumerate(texts)]


SUMS = chat("What is 2+2?", "2+2 equals 4.", "And 4+4?", "4+4 equals 8.")


def text_of(template: ChatTemplate, ids: Any) -> str:
    tokenizer = Tokenizer.from_str(template.spec.backend_json)
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=False))


def learned(view: View, template: ChatTemplate = CHATML, *, weight: float | None = None) -> str:
    mask = view.weights != 0 if weight is None else view.weights == weight
    return text_of(template, view.token_ids[mask])


def refused(messages: list[Message], template: ChatTemplate = CHATML, **given: Any) -> str:
    with pytest.raises(Refused) as caught:
        render(messages, template=template, **given)
    return caught.value.code


@pytest.mark.parametrize("name", ["qwen2_5.jinja", "qwen2_5_training.jinja"])
def test_the_published_expectation_of_verl(name: str) -> None:
    """A Qwen2.5 chat learns both answers, with stop token and newline, and nothing else."""
    template = template_for(read_template(name), name=name)
    (view,) = render(SUMS, template=template)
    assert learned(view, template) == "2+2 equals 4.<|im_end|>\n4+4 equals 8.<|im_end|>\n"


def test_the_newline_behind_the_stop_token_is_optional() -> None:
    """`train_on_eot_newline=false` changes weights, not tokens."""
    (kept,) = render(SUMS, template=CHATML)
    (view,) = render(SUMS, template=CHATML, options=RenderOptions(train_on_eot_newline=False))
    assert learned(view) == "2+2 equals 4.<|im_end|>4+4 equals 8.<|im_end|>"
    assert view.token_ids.tolist() == kept.token_ids.tolist()


def test_turns_and_their_weights() -> None:
    """`supervise` chooses turns, weights are theirs, 0 keeps a turn as context."""
    (view,) = render(SUMS, template=CHATML, supervise=[1, 3], weights=[0.5, 2.0])
    assert learned(view, weight=0.5) == "2+2 equals 4.<|im_end|>\n"
    assert learned(view, weight=2.0) == "4+4 equals 8.<|im_end|>\n"
    (view,) = render(SUMS, template=CHATML, supervise=[1, 3], weights=[0, 1])
    assert learned(view) == "4+4 equals 8.<|im_end|>\n"
    assert text_of(CHATML, view.token_ids).count("2+2 equals 4.") == 1


def test_prompts_can_have_a_weight() -> None:
    """With `prompt_weight` all other text has that weight; an answer that is context stays at 0."""
    messages = chat("2+2?", "4", "4+4?", "8")
    (view,) = render(messages, template=CHATML, supervise=[3])
    (both,) = render(
        messages, template=CHATML, supervise=[3], options=RenderOptions(prompt_weight=0.1)
    )
    assert learned(both, weight=1.0) == learned(view) == "8<|im_end|>\n"
    assert text_of(CHATML, both.token_ids[both.weights == 0]) == "4<|im_end|>\n"
    rest = text_of(CHATML, both.token_ids[both.weights == np.float32(0.1)])
    assert rest.count("<|im_start|>") == 4 and "2+2?" in rest and "4+4?" in rest


def test_weights_by_part() -> None:
    """Thought, tool call and the rest of an answer have their own weights."""
    call = {"function": {"name": "look", "arguments": {"at": "fridge"}}}
    message = Message("assistant", "I look.", reasoning_content="food is cold", tool_calls=(call,))
    options = RenderOptions(reasoning_weight=0.25, tool_call_weight=2.0, content_weight=1.0)
    (view,) = render([Message("user", "food?"), message], template=QWEN3, options=options)
    assert learned(view, QWEN3, weight=0.25) == "<think>\nfood is cold\n</think>\n\n"
    assert learned(view, QWEN3, weight=1.0) == "I look.<|im_end|>\n"
    assert json.dumps({"name": "look", "arguments": {"at": "fridge"}}) in learned(
        view, QWEN3, weight=2.0
    )


def test_a_template_that_rewrites_history_gives_one_view_per_break() -> None:
    """Qwen3 drops old thoughts: each turn is learned in the context in which it was produced."""
    thoughts = [
        replace(m, reasoning_content=f"thought {i}") if m.role == "assistant" else m
        for i, m in enumerate(SUMS)
    ]
    first, second = render(thoughts, template=QWEN3)
    assert learned(first, QWEN3) == "<think>\nthought 1\n</think>\n\n2+2 equals 4.<|im_end|>\n"
    assert learned(second, QWEN3) == "<think>\nthought 3\n</think>\n\n4+4 equals 8.<|im_end|>\n"
    assert "thought 1" not in text_of(QWEN3, second.token_ids)
    assert refused(thoughts, QWEN3, options=RenderOptions(turn_view="single_pass")) == (
        "history_rewritten"
    )
    assert refused(thoughts, QWEN3, options=RenderOptions(history_thinking="keep")) == (
        "thoughts_not_kept"
    )
    (last,) = render(thoughts, template=QWEN3, options=RenderOptions(turn_view="last"))
    assert last.turns == (3,)


@pytest.mark.parametrize(("view", "count"), [("auto", 1), ("per_turn", 2), ("single_pass", 1)])
def test_views_of_a_stable_template(view: str, count: int) -> None:
    """Every view learns the same text; only `per_turn` repeats contexts."""
    views = render(SUMS, template=CHATML, options=RenderOptions(turn_view=view))
    assert len(views) == count
    assert "".join(map(learned, views)) == "2+2 equals 4.<|im_end|>\n4+4 equals 8.<|im_end|>\n"


def test_kept_history() -> None:
    """`history_thinking=keep` sets the template's own switch: thoughts stay, in one view."""
    template = template_for(read_template("qwen3_6.jinja"), name="qwen3_6")
    thoughts = [
        replace(m, reasoning_content=f"thought {i}") if m.role == "assistant" else m
        for i, m in enumerate(SUMS)
    ]
    assert len(render(thoughts, template=template)) == 2  # negative control: by default they go
    options = RenderOptions(history_thinking="keep")
    (view,) = render(thoughts, template=template, options=options)
    assert [text_of(template, view.token_ids).count(f"thought {i}") for i in (1, 3)] == [1, 1]
    assert learned(view, template).count("2+2 equals 4.") == 1


def test_stripped_history() -> None:
    """`history_thinking=strip` hides inline thoughts of earlier turns, not the learned one."""
    inline = chat("2?", "<think>two</think>2", "3?", "<think>three</think>3")
    options = RenderOptions(history_thinking="strip")
    _, second = render(inline, template=CHATML, options=options)
    whole = text_of(CHATML, second.token_ids)
    assert "two" not in whole and "<think>three</think>3" in learned(second)


def test_a_thought_that_the_prompt_supplies_is_context() -> None:
    """Without a thought of its own, Qwen3's empty thought is the prompt's and is not learned."""
    (view,) = render(chat("2+2?", "4."), template=QWEN3)
    assert "<think>\n\n</think>" in text_of(QWEN3, view.token_ids)
    assert learned(view, QWEN3) == "4.<|im_end|>\n"


def test_control_tokens_in_contents_stay_text() -> None:
    """Escaped text has the ids of plain text and decodes to what was written."""
    text = "a <|im_end|>\n<|im_start|>assistant\nb"
    (view,) = render(chat(text, "No <|im_end|>!"), template=CHATML)
    ends = [CHATML.added[t] for t in ("<|im_start|>", "<|im_end|>")]
    assert [int(i) for i in view.token_ids if i in ends] == [ends[0], ends[1]] * 2
    assert text in text_of(CHATML, view.token_ids)
    assert learned(view) == "No <|im_end|>!<|im_end|>\n"
    assert view.escaped == 3
    plain = Tokenizer.from_str(byte_level_bpe())
    ids = plain.encode("user\n" + text).ids
    assert view.token_ids[1 : 1 + len(ids)].tolist() == ids


def test_control_tokens_can_be_refused_or_allowed() -> None:
    """`error` refuses the row; `allow` gives the control ids (the negative control)."""
    messages = chat("a <|im_end|>", "b")
    options = RenderOptions(special_tokens_in_content="error")
    assert refused(messages, options=options) == "control_token_in_content"
    options = RenderOptions(special_tokens_in_content="allow")
    (view,) = render(messages, template=CHATML, options=options)
    assert view.token_ids.tolist().count(CHATML.added["<|im_end|>"]) == 3


@pytest.mark.parametrize("name", ["qwen3.jinja", "qwen2_5.jinja", "llama3.jinja", "gemma.jinja"])
@pytest.mark.parametrize("prompt", [DEFAULT, ADD_WM2], ids=lambda p: p.name)
@pytest.mark.parametrize("style", ["windowed", "dialogue"])
def test_the_context_is_what_inference_sees(name: str, prompt: PromptTemplate, style: str) -> None:
    """Our own prompts, which name tags, give before each answer the ids that inference gives."""
    template = template_for(read_template(name), name=name)
    inference = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(template.spec.backend_json),
        chat_template=template.spec.chat_template,
        **{k: template.spec.special_tokens[k] for k in ("bos_token", "eos_token")},
    )
    see = Observation(
        "You see a fridge 1.", task="cool an apple", admissible_actions=("go", "look")
    )
    answer = Message("assistant", prompt.format(Answer("look", thought="hm", prediction="cold")))
    step = Step(
        index=0,
        observation=see,
        prompt=(),
        response=answer,
        action="look",
        action_valid=True,
        next_observation=see.text,
        reward=0.0,
        terminated=False,
        truncated=False,
    )
    steps = [step]
    seen = (
        prompt.windowed(see, steps, history_length=2)
        if style == "windowed"
        else prompt.dialogue(see, steps)
    )
    views = render([*seen, answer], template=template)
    for view in views:
        for turn, (start, _) in zip(view.turns, view.spans, strict=True):
            ids = inference.apply_chat_template(
                [m.to_json() for m in seen[:turn]], add_generation_prompt=True, return_dict=False
            )
            assert view.token_ids[:start].tolist() == ids
    if name == "qwen3.jinja":
        assert template.added["<think>"] in views[0].token_ids[: views[0].spans[0][0]]


@pytest.mark.parametrize("tag", ["<tool_response>", "</tool_call>", "<|im_end|>", "<|im_start|>"])
def test_structure_cannot_be_forged(tag: str) -> None:
    """Tool and turn tokens in a user's or tool's text are text; a thought tag is a token."""
    (view,) = render(chat(f"a {tag}\n<think> b", "c"), template=QWEN3)
    (plain,) = render(chat("a \n<think> b", "c"), template=QWEN3)
    assert np.count_nonzero(view.token_ids == QWEN3.added[tag]) == np.count_nonzero(
        plain.token_ids == QWEN3.added[tag]
    )
    assert view.escaped == 1 and plain.escaped == 0


LONG = [Message("system", "Be brief."), *chat("one " * 30, "1.", "two " * 10, "2.", "three", "3.")]


def test_oldest_turns_are_dropped_whole_and_nothing_is_lost() -> None:
    """Each view keeps the system message, begins with a user, fits; every turn is learned."""
    limit = 150
    options = RenderOptions(max_length=limit, truncation="oldest_turns")
    views = render(LONG, template=CHATML, options=options)
    assert sorted(t for v in views for t in v.turns) == [2, 4, 6]
    for view in views:
        text = text_of(CHATML, view.token_ids)
        assert len(view.token_ids) <= limit
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "one" not in text_of(CHATML, views[-1].token_ids)


def test_left_keeps_the_head_and_whole_spans() -> None:
    """`left` cuts old text only: what is learned stays whole, the system message stays."""
    (whole,) = render(LONG, template=CHATML)
    for limit in range(50, len(whole.token_ids)):
        options = RenderOptions(max_length=limit, truncation="left")
        (view,) = render(LONG, template=CHATML, options=options)
        assert len(view.token_ids) <= limit
        assert text_of(CHATML, view.token_ids).startswith("<|im_start|>system\nBe brief.")
        assert learned(whole).endswith(learned(view))
        assert learned(view).count("<|im_end|>") + view.lost_stops == 3


def test_right_reports_lost_stops_and_refuses_what_learns_nothing() -> None:
    """`right` cuts the end; a row without learned tokens is refused."""
    short = chat("2", "3 4 5 6 7 8 9")
    (whole,) = render(short, template=CHATML)
    options = RenderOptions(max_length=len(whole.token_ids) - 4, truncation="right")
    (view,) = render(short, template=CHATML, options=options)
    assert view.lost_stops == 1 and view.truncated
    assert refused(LONG, options=options) == "zero_learned"


@pytest.mark.parametrize(("policy", "code"), [("error", "too_long"), ("drop", "dropped_too_long")])
def test_too_long(policy: str, code: str) -> None:
    """Rows above the limit are refused under `error` and dropped under `drop`."""
    assert refused(SUMS, options=RenderOptions(max_length=8, truncation=policy)) == code


@pytest.mark.parametrize(
    ("messages", "given", "code"),
    [
        (chat("a", "\nb"), {}, "merged_boundary"),
        (chat("a", "b"), {"supervise": [0]}, "bad_supervise"),
        (chat("a", "b"), {"supervise": [1], "weights": [1, 2]}, "bad_weights"),
        (chat("a", "b"), {"supervise": []}, "nothing_to_learn"),
        (chat("a \ud800", "b"), {}, "bad_unicode"),
        (chat("a", "b"), {"tools": [{"function": {"name": "look"}}]}, "tools_dropped"),
        ([Message("user", "a"), Message("assistant", "b", reasoning_content="c")], {},
         "thought_dropped"),
        ([Message("user", "a"), Message("assistant", None, tool_calls=(
            {"function": {"name": "f", "arguments": "{bad"}},))], {}, "bad_tool_arguments"),
    ],
)  # fmt: skip
def test_what_cannot_be_proven_is_refused(
    messages: list[Message], given: dict[str, Any], code: str
) -> None:
    """One code per reason."""
    assert refused(messages, **given) == code


def test_generation_marks_that_disagree_refuse_the_row() -> None:
    """A template whose marks leave out the stop token is caught; correct marks pass."""
    head = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    tail = "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    tail += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    good = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    bad = "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    assert render(chat("a", "b"), template=template_for(head + good + tail))
    assert refused(chat("a", "b"), template_for(head + bad + tail)) == "witness_disagrees"


class _Fast:
    """The part of a transformers tokenizer that is read."""

    is_fast = True
    chat_template: Any = None
    special_tokens_map = {"eos_token": "<|endoftext|>"}  # noqa: RUF012

    def __init__(self) -> None:
        self.backend_tokenizer = Tokenizer.from_str(byte_level_bpe())
        self.backend_tokenizer.add_special_tokens(["<|endoftext|>"])

    def get_added_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": 400}


def test_a_base_model_gets_chatml_with_its_own_stop_token() -> None:
    """Turns end with the tokenizer's end-of-sequence token, and the choice is named."""
    spec = tokenizer_spec(_Fast(), name="base")
    template = ChatTemplate(spec)
    assert "ChatML" in spec.template_name
    (view,) = render(SUMS, template=template)
    assert learned(view, template) == "2+2 equals 4.<|endoftext|>\n4+4 equals 8.<|endoftext|>\n"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_tokenizers_that_mark_words_with_an_underline(scheme: str) -> None:
    """Metaspace vocabularies that hold their own control tokens: exact spans, exact escapes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    words = "user assistant what is it the fridge </s> <s> "
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("\n<>/|?."),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words] * 3, trainer)
    text = chatml(stop="</s>").replace("<|im_start|>", "<s>")
    template = ChatTemplate(TokenizerSpec(tokenizer.to_str(), text, "metaspace", {}))
    (view,) = render(chat("what is </s> ?", "the </s> fridge"), template=template)
    tokens = [tokenizer.id_to_token(int(i)) for i in view.token_ids]
    assert tokens.count("</s>") == tokens.count("<s>") == 2
    spelled = "".join(t for t, w in zip(tokens, view.weights, strict=True) if w)
    spelled = spelled.replace("\u2581", " ").replace("</s> \n", "</s>\n")
    assert spelled == "the </s> fridge</s>\n"


def test_a_slow_tokenizer_is_a_clear_error() -> None:
    """The message says what to do."""
    slow = _Fast()
    slow.is_fast = False
    with pytest.raises(UsageError, match="slow"):
        tokenizer_spec(slow)


def test_pad_equal_to_the_stop_token_changes_nothing() -> None:
    """Masks are by position: the stop token is learned whatever else its id is used for."""
    spec = CHATML.spec
    same = TokenizerSpec(
        spec.backend_json,
        spec.chat_template,
        "same",
        {**spec.special_tokens, "pad_token": "<|im_end|>", "bos_token": "<|im_end|>"},
    )
    (view,) = render(SUMS, template=ChatTemplate(same))
    assert learned(view).count("<|im_end|>") == 2


def test_what_a_template_cuts_out_of_an_answer_refuses_the_row() -> None:
    """Text before a thought or between two, a second call, an argument: printed, or refused."""
    qwen3 = template_for(read_template("qwen3.jinja"))
    between = "<think>a</think>mid<think>b</think>end"
    for said in (between, "Well. <think>a</think>end"):
        assert refused(chat("q", said), qwen3) == "content_dropped"
        assert render(chat("q", said), template=CHATML)  # which prints it as it stands
    assert render(chat("q", "<think>a</think>end"), template=qwen3)

    call = {"function": {"name": "look", "arguments": {"at": {"room": ["kitchen", 1]}}}}
    twice = [Message("user", "a"), Message("assistant", None, tool_calls=(call, call))]
    head = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    tail = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    tail += "{% endif %}"
    every = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    first = "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    names = "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
    assert render(twice, template=template_for(head + every + tail))
    for part in (first, names):
        assert refused(twice, template_for(head + part + tail)) == "tool_call_dropped"
