"""Raw trajectories of verl-agent's collector: `messages_list`, rewards and `task_info`.

Its `success` is never set to true by a step, so false says nothing here; the reward is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from verl_sft.records.messages import need_answer, parse_messages
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import object_of
from verl_sft.records.values import BadRowError, sequence
from verl_sft.types import JSON

_NAME = "verl_agent"  # in `meta`: what of the row has no column


def _detect(row: JSON) -> bool:
    return "messages_list" in row and ("final_reward" in row or "rewards" in row)


def _read(row: JSON, options: ReadOptions) -> Iterator[SFTRecord | BadRowError]:
    field = "messages_list"
    chats = sequence(row.get(field), field)
    if not chats:
        raise BadRowError(field, "EMPTY", "the list of messages is empty")
    if all(isinstance(chat, list) for chat in chats):  # one chat per step
        for step, chat in enumerate(chats):
            try:
                yield _record(row, chat, f"{field}[{step}]", step=step)
            except BadRowError as bad:
                yield bad
    else:
        yield _record(row, chats, field, step=0)


def _record(row: JSON, chat: Any, field: str, *, step: int) -> SFTRecord:
    messages, _ = parse_messages(chat, field)
    need_answer(messages, field)
    reward = row.get("final_reward")
    if reward is not None and not (_is_number(reward) and math.isfinite(reward)):
        raise BadRowError("final_reward", "BAD_VALUE", f"{reward!r:.40} is not a finite number")
    pair = [m.role for m in messages] == ["user", "assistant"]
    texts = [m.content if pair and isinstance(m.content, str) else None for m in messages]
    info = object_of(row.get("task_info"), "task_info")
    source = info.get("data_source")
    rest = {k: v for k, v in row.items() if k != "messages_list"}
    known: JSON = {"data_source": source} if isinstance(source, str) and source else {}
    return SFTRecord(
        messages=messages,
        step=step,
        prompt=texts[0] if pair else None,
        response=texts[-1] if pair else None,
        success=True if row.get("success") is True else None,
        reward=None if reward is None else float(reward),
        meta={_NAME: rest},
        **known,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


VERL_AGENT = SourceFormat(
    "verl_agent", "verl-agent raw trajectories: messages_list and rewards", _detect, _read
)
