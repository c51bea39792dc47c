"""Rows of other tools, in verl's parquet conventions, to records; bad rows become `Reject`s.

Values may come as Python objects, numpy arrays, Arrow structs or JSON text. Nulls that Arrow
invented by unifying structs are gone already (`without_nulls`); others are the writer's and stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_sft.records.messages import check_message, check_order, need_answer, parse_messages
from verl_sft.records.rows import ColumnError, row_to_record
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError, as_float, plain, sequence, struct, weight_of
from verl_sft.types import JSON, Message


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: where it is, what is wrong, what to do."""

    file: str
    row: int
    field: str
    code: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.row}:{self.field}: {self.code}: {self.message}. {self.fix}"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Which columns hold what; the names are those of `data.*` in the training config."""

    multiturn: bool = False
    messages_key: str = "messages"
    tools_key: str = "tools"
    prompt_key: str = "prompt_data"
    response_key: str = "response_data"
    prompt_dict_keys: tuple[str, ...] | None = None
    response_dict_keys: tuple[str, ...] | None = None
    enable_thinking_key: str = "enable_thinking"
    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()  # of a data set: (role of the column, its name)
    tags: tuple[tuple[str, str], ...] = ()  # ShareGPT keys and role names that differ
    mask_history: bool | None = None  # learn the last answer only; None: as the format has it
    drop_zero_advantage: bool | None = None  # of AgentRL; None: as the format has it
    minimal_advantage: float | None = None
    rows: str = "step"  # of raw episodes: step | episode
    prompt: str = ""  # template of their prompts; empty: as they were made
    history_length: int | None = None  # of windowed prompts; None: as they were made
    require_success: bool = True  # of episodes
    valid_actions: str = "any"

    @property
    def names_columns(self) -> bool:
        """Whether other columns than the default ones were asked for."""
        if self.multiturn:
            return self.messages_key != "messages"
        return (self.prompt_key, self.response_key) != ("prompt_data", "response_data")

    @property
    def reads_own_columns(self) -> bool:
        """Whether the keys are those of our own files, whose `messages_json` is the truth."""
        if self.multiturn:
            return self.messages_key == "messages"
        keys = (self.prompt_key, self.response_key)
        paths = (self.prompt_dict_keys or ("content",), self.response_dict_keys or ("content",))
        own_paths = all(tuple(p) == ("content",) for p in paths)
        return keys == ("prompt_data", "response_data") and own_paths


def parse_own(row: Mapping[str, Any], *, options: ReadOptions) -> SFTRecord:
    """A row of our own schema.

    Raises:
        BadRowError: it was damaged, or holds no single-turn pair where one is asked for.
    """
    try:
        record = row_to_record(row)
    except ColumnError as error:
        raise BadRowError(
            error.column, "BAD_VALUE", f"not what the column holds: {error}"
        ) from error
    if not record.messages:
        raise BadRowError("messages_json", "EMPTY", "the list of messages is empty")
    for index, message in enumerate(record.messages):
        check_message(message, "messages_json", index)
    check_order(record.messages, "messages_json")
    _check_supervised(record.messages, record.supervise, record.weights)
    if not options.multiturn and record.prompt is None:
        raise BadRowError(
            options.prompt_key,
            "NO_PROMPT",
            "the row holds a whole episode, not a prompt and a response",
            "Set data.multiturn.enable=true, or collect with output.rows=step",
        )
    return record


def parse_verl(row: Mapping[str, Any], *, options: ReadOptions) -> SFTRecord:
    """A row of any verl-style parquet file.

    Raises:
        BadRowError: it cannot be used; the error names the field.
    """
    known: JSON = _scalars(row)
    if options.multiturn:
        messages, weights = parse_messages(row.get(options.messages_key), options.messages_key)
    else:
        messages, known["prompt"], known["response"] = _pair(row, options)
        weights = None
    supervise = row.get("supervise")
    if supervise is not None:
        known["supervise"] = tuple(_index(i) for i in sequence(supervise, "supervise"))
        if (given := row.get("weights")) is not None:
            values = sequence(given, "weights")
            known["weights"] = tuple(weight_of(v, "weights") for v in values)
    elif weights is not None:
        known["supervise"] = tuple(weights)
        numbers = tuple(weights.values())
        known["weights"] = None if all(v == 1 for v in numbers) else numbers
    elif not options.multiturn:
        known["supervise"] = (len(messages) - 1,)
    _check_supervised(messages, known.get("supervise"), known.get("weights"))
    tools = row.get(options.tools_key)
    if tools is not None:
        items = sequence(tools, options.tools_key)
        known["tools"] = tuple(struct(t, options.tools_key) for t in items) or None
    thinking = row.get(options.enable_thinking_key)
    if thinking is not None:
        known["meta"] = {"enable_thinking": _flag(plain(thinking), options.enable_thinking_key)}
    return SFTRecord(messages=messages, **known)


def _pair(row: Mapping[str, Any], options: ReadOptions) -> tuple[tuple[Message, ...], Any, str]:
    prompt = _walk(row.get(options.prompt_key), options.prompt_key, options.prompt_dict_keys)
    answer = _walk(row.get(options.response_key), options.response_key, options.response_dict_keys)
    if isinstance(answer, list) and answer:
        answer = struct(answer[-1], options.response_key).get("content")
    if not isinstance(answer, str):
        raise BadRowError(options.response_key, "NO_TEXT", "the response is not text")
    last = Message(role="assistant", content=answer)
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt), last), prompt, answer
    if isinstance(prompt, list):
        before, _ = parse_messages(prompt, options.prompt_key)
        only = before[0].content if len(before) == 1 and before[0].role == "user" else None
        return (*before, last), only if isinstance(only, str) else None, answer
    raise BadRowError(options.prompt_key, "NO_TEXT", "the prompt is not text")


def _walk(value: Any, field: str, path: Sequence[str] | None) -> Any:
    """The text (or list of messages) at the end of `path` inside a struct column."""
    value = plain(value)
    if path is None:
        path = ("content",) if isinstance(value, dict) else ()
    for key in path:
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            name = field.split("_")[0]
            fix = f"There is: {there}. Set data.{name}_dict_keys to a path that exists"
            raise BadRowError(field, "NO_KEY", f"no key '{key}' in the column", fix)
        value = value[key]
    return value


def _scalars(row: Mapping[str, Any]) -> JSON:
    """Columns that mean the same everywhere; a value of another type is someone else's column."""
    known: JSON = {}
    texts = ("data_source", "ability", "group_id", "episode_id", "task_id", "task_type", "env_name")
    for names, kind in ((texts, str), (("success", "agent_success"), bool)):
        for name in names:
            if isinstance(value := plain(row.get(name)), kind):
                known[name] = value
    reward = plain(row.get("reward"))
    if isinstance(reward, int | float) and not math.isnan(reward := as_float(reward, "reward")):
        known["reward"] = reward
    if row.get("sample_weight") is not None:
        known["sample_weight"] = weight_of(plain(row["sample_weight"]), "sample_weight")
    return known


def _check_supervised(
    messages: Sequence[Message], supervise: Sequence[int] | None, weights: Sequence[float] | None
) -> None:
    if supervise is None:
        need_answer(messages, "messages")
        return
    if not supervise:
        raise BadRowError("supervise", "NOTHING_LEARNED", "no message of the row is learned")
    for index in supervise:
        if not 0 <= index < len(messages) or messages[index].role != "assistant":
            message = f"index {index} is not an assistant message"
            raise BadRowError("supervise", "BAD_INDEX", message)
    if weights is not None and len(weights) != len(supervise):
        message = f"{len(weights)} weights for {len(supervise)} learned messages"
        raise BadRowError("weights", "BAD_LENGTH", message)
    for value in weights or ():
        weight_of(value, "weights")


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRowError("supervise", "BAD_INDEX", f"{value!r:.40} is not an index")
    return value


def _flag(value: Any, field: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise BadRowError(field, "BAD_TYPE", f"{value!r:.40} is neither true nor false")
