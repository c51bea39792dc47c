"""Records -> conversations: single-turn pairs, and step rows of one episode folded into one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from verl_sft.records.schema import SFTRecord
from verl_sft.types import JSON, Message

_UNNAMED: str = SFTRecord(messages=()).data_source  # of a row that names none


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is rendered at once; `weights` maps each learned message to its weight.

    `parts` are the conversations that were folded into this one (empty: none were), so that one
    step that must be refused does not take its episode with it.
    """

    messages: tuple[Message, ...]
    weights: Mapping[int, float] | None
    record_id: str
    source: str
    tools: tuple[JSON, ...] | None = None
    sample_weight: float = 1.0
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None  # of its source, in tokens
    parts: tuple[Conversation, ...] = ()
    group: str = ""  # what losses are told apart by: the data source, or the file
    first_turn: int = 0  # number of its first assistant turn in the episode


def conversations(records: Iterable[SFTRecord], *, multiturn: bool) -> Iterator[Conversation]:
    """One conversation per record; in multi-turn mode prefixes of one episode become one.

    Rows of an episode fold when they are neighbours in the data and one's messages begin the
    other's: `supervise` is united and every turn is still learned once.
    """
    if not multiturn:  # formats that have no pairs give whole conversations in either mode
        yield from (single_turn(r) if r.prompt is not None else dialogue(r) for r in records)
        return
    for episode, rows in groupby(records, key=lambda record: record.episode_id):
        if episode:
            yield from fold(map(dialogue, rows))
        else:
            yield from map(dialogue, rows)


def single_turn(record: SFTRecord) -> Conversation:
    """Prompt and response as a chat of two messages, of which the response is learned."""
    messages = (Message("user", record.prompt), Message("assistant", record.response))
    weight = record.weights[-1] if record.weights else 1.0
    learned = {} if record.supervise == () else {1: weight}
    chat = _conversation(record, messages=messages, weights=learned)
    return replace(chat, first_turn=max(record.step, 0))


def dialogue(record: SFTRecord) -> Conversation:
    """The whole chat with the messages that the row says are learned."""
    learned = record.supervise
    if learned is None:
        if record.weights is None:
            return _conversation(record, messages=record.messages, weights=None)
        learned = tuple(i for i, m in enumerate(record.messages) if m.role == "assistant")
    weights = record.weights or (1.0,) * len(learned)
    return _conversation(
        record, messages=record.messages, weights=dict(zip(learned, weights, strict=False))
    )


def fold(rows: Iterable[Conversation]) -> Iterator[Conversation]:
    """Merge each conversation into the first one that it begins or that begins it."""
    trunks: list[Conversation] = []
    for row in rows:
        for place, trunk in enumerate(trunks):
            if _is_prefix(trunk, row):
                trunks[place] = _merge(row, trunk)
                break
            if _is_prefix(row, trunk):
                trunks[place] = _merge(trunk, row)
                break
        else:
            trunks.append(row)
    return iter(trunks)


def _conversation(
    record: SFTRecord, *, messages: tuple[Message, ...], weights: Mapping[int, float] | None
) -> Conversation:
    thinking = record.meta.get("enable_thinking")
    return Conversation(
        messages=messages,
        weights=weights,
        record_id=record.record_id,
        source=record.source,
        tools=record.tools,
        sample_weight=record.sample_weight,
        template_kwargs={} if thinking is None else {"enable_thinking": bool(thinking)},
        group=_group(record),
        max_length=record.meta.get("max_length"),
    )


def _group(record: SFTRecord) -> str:
    """The data source that the row names, else the name of its file without suffixes."""
    if record.data_source and record.data_source != _UNNAMED:
        return record.data_source
    return record.source.rpartition(":")[0].partition(".")[0]


def _is_prefix(short: Conversation, long: Conversation) -> bool:
    """Whether a model that reads `long` reads `short` on the way, under equal settings."""
    return (
        len(short.messages) <= len(long.messages)
        and short.weights is not None
        and long.weights is not None
        and short.messages == long.messages[: len(short.messages)]
        and short.tools == long.tools
        and short.template_kwargs == long.template_kwargs
    )


def _merge(long: Conversation, short: Conversation) -> Conversation:
    """`long` with the turns of both; each turn keeps the weight of the row that learned it."""
    assert long.weights is not None and short.weights is not None
    weights = {i: w * short.sample_weight for i, w in short.weights.items()}
    weights.update({i: w * long.sample_weight for i, w in long.weights.items()})
    return Conversation(
        messages=long.messages,
        weights=weights,
        record_id=long.record_id,
        source=long.source,
        tools=long.tools,
        template_kwargs=long.template_kwargs,
        max_length=long.max_length,
        group=long.group,
        parts=(*(short.parts or (short,)), *(long.parts or (long,))),
    )
