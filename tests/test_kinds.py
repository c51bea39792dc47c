"""Labels of tokens: which kind, which turn, which source, from the text to the store."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np

from tests.chat_templates import read_template, template_for
from tests.test_load import SPEC, config, load, step_rows
from tests.test_render import CHATML, QWEN3, chat, text_of
from verl_sft.data.kinds import KINDS, SOURCE, TURN, with_turn
from verl_sft.data.load import load_samples
from verl_sft.data.render import render
from verl_sft.data.store import MOST_GROUPS, StoreWriter
from verl_sft.data.template import ChatTemplate
from verl_sft.data.view import RenderOptions, View
from verl_sft.prompts.alfworld import ADD_WM2
from verl_sft.records.io import write_parquet
from verl_sft.types import Answer, Message


def spelled(view: View, template: ChatTemplate) -> list[tuple[str, int, str]]:
    """(kind, turn, text) of each run of tokens with one label; context is left out."""
    runs = groupby(range(len(view.labels)), key=lambda i: int(view.labels[i]))
    return [
        (KINDS[label % TURN], label // TURN, text_of(template, view.token_ids[list(places)]))
        for label, places in runs
        if label
    ]


def test_tags_of_a_world_model_answer() -> None:
    """Thought, observation, prediction and action by their tags, then the stop token."""
    answer = ADD_WM2.format(
        Answer(thought="why", observation="a box", prediction="it opens", action="open box")
    )
    (view,) = render(chat("Go.", answer, "Next.", "plain"), template=CHATML)
    shown = [(kind, turn, text.strip()) for kind, turn, text in spelled(view, CHATML)]
    shown = [entry for entry in shown if entry[2]]
    assert shown == [
        ("thought", 0, "<think>why</think>"),
        ("observation", 0, "<observation>a box</observation>"),
        ("prediction", 0, "<prediction>it opens</prediction>"),
        ("action", 0, "<action>open box</action>"),
        ("stop", 0, "<|im_end|>"),
        ("content", 1, "plain"),
        ("stop", 1, "<|im_end|>"),
    ]


def test_thought_and_tool_call_of_their_own_fields() -> None:
    """What a template prints from `reasoning_content` and `tool_calls` is found as such."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    message = Message("assistant", "Fine.", reasoning_content="hm", tool_calls=(call,))
    (view,) = render([Message("user", "Hi."), message], template=QWEN3)
    by_kind = {kind: text for kind, _, text in spelled(view, QWEN3)}
    assert "hm" in by_kind["thought"] and "</think>" in by_kind["thought"]
    assert by_kind["content"].strip() == "Fine."
    assert '"look"' in by_kind["tool_call"] and "<tool_call>" in by_kind["tool_call"]
    assert by_kind["stop"].startswith("<|im_end|>")


def test_labels_follow_the_weights() -> None:
    """Exactly the learned tokens have a label, also where a long conversation is cut."""
    template = template_for(read_template("qwen2_5.jinja"), name="qwen2_5")
    talk = chat(*(f"word {i} and more" for i in range(12)))
    (whole,) = render(talk, template=template)
    half = len(whole.token_ids) // 2
    for options in (
        RenderOptions(),
        RenderOptions(max_length=half, truncation="right"),
        RenderOptions(max_length=half, truncation="left"),
        RenderOptions(max_length=half, truncation="oldest_turns"),
    ):
        for view in render(talk, template=template, options=options):
            assert ((view.labels != 0) == (view.weights != 0)).all(), options
            assert (np.diff(view.labels[view.labels != 0].astype(int) // TURN) >= 0).all()
    # Turns count from the beginning of the conversation, cut or not.
    assert view.labels.max() // TURN == 5


def test_turn_numbers_are_capped() -> None:
    """The ninth turn and all behind it count as one; another turn keeps the kinds."""
    (view,) = render(chat(*("x" for _ in range(24))), template=CHATML)
    assert sorted({int(label) // TURN for label in view.labels if label}) == list(range(9))
    moved = with_turn(view.labels, 3)
    assert set(moved[moved > 0] // TURN) == {3}
    assert (moved % TURN == view.labels % TURN).all()


def test_the_store_keeps_labels_and_sources(tmp_path: Path) -> None:
    """Two files are two sources; a pair of prompt and response is the turn of its step."""
    store = load(tmp_path, step_rows(2))
    assert store.groups == ("train",)
    (first, *_) = list(store)
    assert first.labels is not None and ((first.labels != 0) == (first.weights != 0)).all()

    files = [tmp_path / "left.parquet", tmp_path / "right.parquet"]
    for file in files:
        write_parquet(file, step_rows(1))
    both = load_samples(
        files, tokenizer=SPEC, config=config(multiturn=False), cache_dir=tmp_path / "cache",
        num_workers=1,
    )  # fmt: skip
    assert both.groups == ("left", "right") and len(both) == 6
    seen = [
        (int(s.labels.max()) // SOURCE, int(s.labels.max()) % SOURCE // TURN)
        for s in both if s.labels is not None
    ]  # fmt: skip
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_too_many_sources_share_the_last_number(tmp_path: Path) -> None:
    """Beyond the limit sources count as `others`, whatever their order."""
    writer = StoreWriter(tmp_path / "store")
    numbers = [writer._group_number(f"s{i}") for i in range(MOST_GROUPS + 20)]
    assert numbers[: MOST_GROUPS - 1] == list(range(MOST_GROUPS - 1))
    assert set(numbers[MOST_GROUPS - 1 :]) == {MOST_GROUPS - 1}
    assert list(writer._group_names)[-1] == "others" and len(writer._group_names) == MOST_GROUPS
    with writer:
        pass
