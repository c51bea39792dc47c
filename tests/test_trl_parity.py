"""Ids and labels against TRL's own data preparation; every difference is one of those named here.

TRL trusts a template's `{% generation %}` marks; we start where the generation prompt ends. So TRL
may also learn what the prompt supplies (a header, an empty thought) or the end-of-text token that
closes a whole conversation, and it keeps what follows the last answer as context. Where a template
prints another stop token once a conversation goes on, TRL learns that one; ours is what the model
must say. Where a marked block ends with a character of several tokens, transformers' mask ends with
the first of them.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.chat_templates import template_names
from tests.test_masks_sweep import SHAPES, chat_template
from verl_sft.data.messages import Refused, prepare
from verl_sft.data.render import render
from verl_sft.data.view import View
from verl_sft.types import Message

trl = pytest.importorskip("trl", reason="compares with trl")
datasets = pytest.importorskip("datasets", reason="trl prepares datasets")

NAMES = [name for name in template_names() if name.endswith("_training.jinja")]
USED = ("plain", "multi-turn", "system", "unicode", "ends with user", "two users", "empty content")
# Thoughtless answers of these are rendered with thinking off; TRL is asked for the same.
NO_THINKING = ("glm4moe_training.jinja", "qwen3_8_training.jinja")


@cache
def tokenizer(name: str) -> Any:
    spec = chat_template(name).spec
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(spec.backend_json),
        chat_template=spec.chat_template,
        **{k: spec.special_tokens[k] for k in ("bos_token", "eos_token", "pad_token")},
    )


@cache
def arguments() -> Any:
    return trl.SFTConfig(
        assistant_only_loss=True, max_length=None, bf16=False, use_cpu=True, output_dir="unused"
    )


def trl_rows(name: str, chats: list[list[Message]]) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of conversations, by TRL."""
    template = chat_template(name)
    extra = {"enable_thinking": False} if name in NO_THINKING else {}
    rows = [
        {
            "messages": prepare(chat, template=template, control_text="allow")[0],
            "chat_template_kwargs": {"unused": 1, **extra},
        }
        for chat in chats
    ]
    trainer = SimpleNamespace(chat_template=template.spec.chat_template, completion_only_loss=False)
    return list(
        trl.SFTTrainer._prepare_dataset(
            trainer, datasets.Dataset.from_list(rows), tokenizer(name), arguments(), False, None, ""
        )
    )


def difference(view: View, row: dict[str, list[int]], name: str) -> set[str]:
    """What is different, by name; raises for anything without one."""
    template, size = chat_template(name), len(view.token_ids)
    ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
    found = set()
    unequal = np.flatnonzero(ids[:size] != view.token_ids)
    if unequal.tolist() == [size - 1] and size < len(ids) and template.is_added[ids[size - 1]]:
        found.add("history's stop token learned")
    else:
        assert not len(unequal)
    rest = template.added_pattern.sub("", tokenizer(name).decode(ids[size:][labels[size:] >= 0]))
    assert rest.strip() == ""
    if len(ids) > size:
        found.add("end of text learned" if (labels[size:] >= 0).any() else "what follows")
    ours, theirs = view.weights != 0, labels[:size] >= 0
    starts = np.array([start for start, _ in view.spans])
    for at in np.flatnonzero(ours & ~theirs):
        assert tokenizer(name).decode(ids[:at]).endswith("\ufffd"), (name, at)  # inside a character
        found.add("last character cut")
    for at in np.flatnonzero(theirs & ~ours):
        begin = starts[starts > at].min()
        assert theirs[at:begin].all() and begin - at <= 6, (name, at)
        found.add("prompt learned")
    return found


def test_ids_and_labels_of_trl() -> None:
    """Equal ids everywhere; equal labels, or a difference of a documented kind."""
    datasets.disable_progress_bars()
    kinds: Counter[str] = Counter()
    for name in NAMES:
        views = {}
        for shape in USED:
            try:
                found = render(SHAPES[shape], template=chat_template(name))
            except Refused:
                continue
            if len(found) == 1:
                views[shape] = found[0]
        if not views:
            continue
        rows = trl_rows(name, [SHAPES[shape] for shape in views])
        for view, row in zip(views.values(), rows, strict=True):
            kinds[", ".join(sorted(difference(view, row, name))) or "equal"] += 1
    assert kinds["equal"] >= 60, kinds
    assert kinds.total() >= 170, kinds
    assert kinds["last character cut"] == 1, kinds
    assert {k for kind in kinds for k in kind.split(", ")} <= {
        "equal", "what follows", "prompt learned", "end of text learned",
        "history's stop token learned", "last character cut",
    }, kinds  # fmt: skip


def test_the_comparison_can_fail() -> None:
    """Negative control: a mask shifted by one token has no name."""
    name = "llama3_training.jinja"
    (view,) = render(SHAPES["plain"], template=chat_template(name))
    (row,) = trl_rows(name, [SHAPES["plain"]])
    assert difference(view, row, name) == set()
    for step in (1, -1):
        labels = np.roll(row["labels"], step).tolist()
        with pytest.raises((AssertionError, ValueError)):
            difference(view, {**row, "labels": labels}, name)
