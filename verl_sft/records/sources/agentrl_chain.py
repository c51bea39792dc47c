"""AgentRL's trajectories: a Record with its calls (DispatchedSamplingTask) as RecordData rows.

A call whose messages and answer begin a longer call of the same trajectory is learned there, so
that a chat of n turns is one row, not n. A document of this format carries its calls in `traj`
and its Task in `task`; `records/mongo.py` puts them there in place of links.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl_sft.records.parse import ReadOptions
from verl_sft.records.rows import load_json
from verl_sft.records.schema import NOTE, SFTRecord
from verl_sft.records.sources.agentrl import AGENTRL
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import object_of
from verl_sft.records.values import BadRowError, sequence
from verl_sft.safe_io import content_hash
from verl_sft.types import JSON

UNSCORED = "neither calls nor trajectory have a score: every answer is learned"
_COMPLETED = "completed"  # other calls are context where a later one quotes them
_COMPARED = ("role", "reasoning_content", "tool_call_id", "name", "audio")


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: the messages that it was asked with and, last, its answer."""

    messages: list[JSON]
    hashes: list[str]
    tools: Any
    figures: JSON  # score, advantage, created_at_step and logprobs of the answer


@dataclass(slots=True)
class _Sample:
    call: _Call
    figures: dict[int, JSON]


def chain_rows(
    record: Mapping[str, Any],
    calls: Sequence[Any],
    *,
    task: Mapping[str, Any] | None = None,
    drop_zero_advantage: bool = True,
    minimal_advantage: float | None = None,
) -> Iterator[JSON | BadRowError]:
    """The RecordData rows of one trajectory, in the order of its calls.

    The advantage of an answer is its call's, else its call's score, else the trajectory's score
    less the mean score of the task. Without any of them each answer counts 1.

    Args:
        record: a Record document.
        calls: its DispatchedSamplingTask documents in order; only completed ones are learned.
        task: the Task document, for the scores of the other trajectories.
        drop_zero_advantage: an answer with advantage 0 is context only.
        minimal_advantage: so is one below it.

    Returns:
        Rows, and errors in place of what cannot be used or is left out as asked.
    """
    if record.get("status") == "abandoned":
        yield BadRowError("status", "ABANDONED", "the trajectory was abandoned")
        return
    found: list[_Call] = []
    for index, value in enumerate(calls):
        try:
            call = object_of(value, f"traj[{index}]")
            if call.get("status", _COMPLETED) == _COMPLETED:
                found.append(_call(call, record, task, where=f"traj[{index}]"))
        except BadRowError as bad:
            yield bad
    if not found:
        yield BadRowError("traj", "NO_COMPLETED_CALL", "no call of the trajectory was completed")
    for sample in _merged(found):
        small = {
            index
            for index, figures in sample.figures.items()
            if (drop_zero_advantage and figures["advantage"] == 0)
            or (minimal_advantage is not None and figures["advantage"] < minimal_advantage)
        }
        learned = {i: f for i, f in sorted(sample.figures.items()) if i not in small}
        if learned:
            yield _row(record, sample.call, learned)
        else:
            fix = "Set data.agentrl.drop_zero_advantage=false to learn it all the same"
            text = "every answer has an advantage of 0 or below the minimum"
            yield BadRowError("traj", "SMALL_ADVANTAGE", text, fix)


def _merged(calls: Sequence[_Call]) -> list[_Sample]:
    """Calls from last to first, each folded into a later one that it begins."""
    samples: list[_Sample] = []
    for call in reversed(calls):
        size = len(call.hashes)
        for sample in samples:
            if call.tools == sample.call.tools and sample.call.hashes[:size] == call.hashes:
                sample.figures.setdefault(size - 1, call.figures)
                break
        else:
            samples.append(_Sample(call, {size - 1: call.figures}))
    return samples[::-1]


def _call(call: JSON, record: Mapping[str, Any], task: Any, *, where: str) -> _Call:
    if call.get("req_type", "chatcompletions") != "chatcompletions":
        text = f"a call of type {call['req_type']!r:.40} has no messages"
        raise BadRowError(f"{where}.req_type", "NOT_A_CHAT", text)
    request = object_of(call.get("request"), f"{where}.request")
    asked = sequence(request.get("messages"), f"{where}.request.messages")
    response = object_of(call.get("response"), f"{where}.response")
    choices = sequence(response.get("choices"), f"{where}.response.choices")
    if not choices:
        raise BadRowError(f"{where}.response.choices", "EMPTY", "the call has no answer")
    choice = object_of(choices[0], f"{where}.response.choices[0]")
    messages = [
        *(object_of(m, f"{where}.request.messages[{i}]") for i, m in enumerate(asked)),
        {"role": "assistant"}
        | object_of(choice.get("message"), f"{where}.response.choices[0].message"),
    ]
    logprobs = object_of(choice.get("logprobs"), f"{where}.response.choices[0].logprobs")
    step = call.get("created_at_step")
    if step is not None and type(step) is not int:
        raise BadRowError(f"{where}.created_at_step", "BAD_VALUE", f"{step!r:.40} is no step")
    score = _number(call.get("score"), f"{where}.score")
    of_record = _number(record.get("score"), "score")
    figures = {
        "score": of_record if score is None else score,
        "advantage": _number(call.get("advantage"), f"{where}.advantage"),
        "created_at_step": step,
        "logprobs": logprobs.get("content"),
        "unscored": False,
    }
    if figures["advantage"] is None:
        figures["advantage"] = score
    if figures["advantage"] is None and of_record is not None:
        figures["advantage"] = of_record - _mean_score(task)
    if figures["advantage"] is None:
        figures |= {"advantage": 1.0, "unscored": True}
    tools = request.get("tools") or None
    return _Call(messages, [_hash(m) for m in messages], tools, figures)


def _hash(message: JSON) -> str:
    """What two messages must share to be the same one; nulls and empty lists say nothing."""
    calls = []
    for call in message.get("tool_calls") or [{"function": message.get("function_call")}]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            called = {"id": call.get("id"), "name": function.get("name")}
            calls.append(called | {"arguments": _arguments(function.get("arguments"))})
    content = message.get("content")
    same = {key: message.get(key) for key in _COMPARED}
    return content_hash([same, calls, content or None if calls else content])


def _arguments(value: Any) -> Any:
    try:
        return load_json(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _row(record: Mapping[str, Any], call: _Call, learned: Mapping[int, JSON]) -> JSON:
    steps = [f["created_at_step"] for f in learned.values() if f["created_at_step"] is not None]
    score = _number(record.get("score"), "score")
    row: JSON = {
        "messages": call.messages,
        "tools": call.tools,
        "reward": 0.0 if score is None else score,
        "step": max(steps, default=-1),
        "record_id": str(record.get("_id") or record.get("id") or record.get("traj_id") or ""),
    }
    if record.get("split") is not None:
        row["split"] = record["split"]
    names = {"scores": "score", "advantages": "advantage", "created_at_step": "created_at_step"}
    for field, name in {**names, "logprobs": "logprobs"}.items():
        row[field] = {
            str(index): figures[name]
            for index, figures in learned.items()
            if figures[name] is not None or name == "logprobs"
        }
    if any(figures["unscored"] for figures in learned.values()):
        row[NOTE] = UNSCORED
    return row


def _mean_score(task: Mapping[str, Any] | None) -> float:
    values = sequence((task or {}).get("scores") or [], "task.scores")
    scores = [_number(value, f"task.scores[{i}]") or 0.0 for i, value in enumerate(values)]
    return sum(scores) / max(len(scores), 1)


def _number(value: Any, field: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadRowError(field, "BAD_VALUE", f"{value!r:.40} is not a finite number")
    return float(value)


def _detect(row: JSON) -> bool:
    return "traj" in row and "messages" not in row and isinstance(row["traj"], list | str)


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord | BadRowError]:
    task = row.get("task")
    task = object_of(task, "task") if isinstance(task, Mapping) else {}
    calls = sequence(row.get("traj"), "traj")
    rows = chain_rows(
        row,
        calls,
        task=task,
        drop_zero_advantage=options.drop_zero_advantage is not False,
        minimal_advantage=options.minimal_advantage,
    )
    states = Counter(str(c.get("status", _COMPLETED)) for c in calls if isinstance(c, dict))
    name = str(task.get("tid") or task.get("task_id") or task.get("_id") or "")
    for found in rows:
        if isinstance(found, BadRowError):
            yield found
            continue
        note = found.pop(NOTE, None)
        try:
            (record,) = AGENTRL.read(found, replace(options, drop_zero_advantage=False))
        except BadRowError as bad:
            yield bad
            continue
        assert isinstance(record, SFTRecord)
        meta = {**record.meta, "calls": dict(states)}
        if isinstance(row.get("status"), str):
            meta["status"] = row["status"]
        if note is not None:
            meta[NOTE] = note
        score = row.get("score")
        yield replace(
            record,
            task_id=name,
            group_id=name or record.group_id,
            reward=None if score is None else record.reward,
            meta=meta,
        )


AGENTRL_CHAIN = SourceFormat(
    "agentrl_chain", "AgentRL Record documents with their calls in traj", _detect, _read
)
