"""Rows of other tools, in verl's parquet conventions, to records; bad rows become `Reject`s.

Values may come as Python objects, numpy arrays, Arrow structs or JSON text. Nulls that Arrow
invented by unifying structs are gone already (`without_nulls`); others are the writer's and stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_sft.records.rows import load_json, row_to_record
from verl_sft.records.schema import SFTRecord
from verl_sft.types import JSON, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
_LEAVES = frozenset({str, int, float, bool, type(None)})
WEIGHT_ALIASES = ("loss_mask", "loss", "weight", "loss_weight", "trainable", "train")


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


class BadRowError(ValueError):
    """One row cannot be used; `read_records` turns it into a `Reject`."""

    def __init__(self, field: str, code: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.field, self.code, self.message, self.fix = field, code, message, fix


def parse_own(row: Mapping[str, Any], *, options: ReadOptions) -> SFTRecord:
    """A row of our own schema.

    Raises:
        BadRowError: it was damaged, or holds no single-turn pair where one is asked for.
    """
    try:
        record = row_to_record(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRowError(
            "messages_json", "BAD_VALUE", f"the row does not follow the schema: {error}"
        ) from error
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
        known["supervise"] = tuple(int(i) for i in _sequence(supervise, "supervise"))
        given = row.get("weights")
        known["weights"] = None if given is None else tuple(map(float, _sequence(given, "weights")))
    elif weights is not None:
        known["supervise"] = tuple(weights)
        values = tuple(weights.values())
        known["weights"] = None if all(v == 1 for v in values) else values
    elif not options.multiturn:
        known["supervise"] = (len(messages) - 1,)
    _check_supervised(messages, known.get("supervise"), known.get("weights"))
    tools = row.get(options.tools_key)
    if tools is not None:
        items = _sequence(tools, options.tools_key)
        known["tools"] = tuple(_struct(t, options.tools_key) for t in items) or None
    thinking = row.get(options.enable_thinking_key)
    if thinking is not None:
        known["meta"] = {"enable_thinking": bool(thinking)}
    return SFTRecord(messages=messages, **known)


def parse_messages(value: Any, field: str) -> tuple[tuple[Message, ...], dict[int, float] | None]:
    """Messages in any encoding, and the weight of each learned one where a flag says so.

    Returns:
        `(messages, weights)`; `weights` maps the index of each learned assistant message to its
        weight, or is None where no message carries one of `WEIGHT_ALIASES`.

    Raises:
        BadRowError: not a list of messages.
    """
    items = _sequence(value, field)
    if not items:
        raise BadRowError(field, "EMPTY", "the list of messages is empty")
    messages: list[Message] = []
    flags: dict[int, float] = {}
    for index, item in enumerate(items):
        where = f"{field}[{index}]"
        entry = _struct(item, where)
        messages.append(_message(entry, where))
        alias = next((a for a in WEIGHT_ALIASES if entry.get(a) is not None), None)
        if alias is None:
            continue
        flags[index] = weight_of(entry[alias], f"{where}.{alias}")
        if flags[index] > 0 and messages[-1].role != "assistant":
            raise BadRowError(
                f"{where}.{alias}",
                "NOT_ASSISTANT",
                f"a message of role '{messages[-1].role}' cannot be learned",
                "Set its weight to 0",
            )
    if not flags:
        return tuple(messages), None
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    return tuple(messages), {i: flags.get(i, 1.0) for i in turns if flags.get(i, 1.0) > 0}


def _message(entry: JSON, where: str) -> Message:
    role = entry.get("role")
    if role not in ROLES:
        fix = f"Use one of {', '.join(ROLES)}"
        raise BadRowError(f"{where}.role", "BAD_ROLE", f"unknown role {role!r:.40}", fix)
    content = entry.get("content")
    if content is not None and not isinstance(content, str):
        if not isinstance(content, list) or not all(isinstance(p, dict) for p in content):
            kind = type(content).__name__
            message = f"content is {kind}, not text or a list of parts"
            raise BadRowError(f"{where}.content", "BAD_TYPE", message)
    elif content is None and not entry.get("tool_calls") and not entry.get("reasoning_content"):
        raise BadRowError(f"{where}.content", "NO_TEXT", "the message has no content")
    calls = entry.get("tool_calls")
    if isinstance(calls, str):
        calls = _json(calls, f"{where}.tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise BadRowError(f"{where}.tool_calls", "BAD_TYPE", "tool_calls is not a list")
    return Message.from_json({**entry, "tool_calls": calls or None})


def _pair(row: Mapping[str, Any], options: ReadOptions) -> tuple[tuple[Message, ...], Any, str]:
    prompt = _walk(row.get(options.prompt_key), options.prompt_key, options.prompt_dict_keys)
    answer = _walk(row.get(options.response_key), options.response_key, options.response_dict_keys)
    if isinstance(answer, list) and answer:
        answer = _struct(answer[-1], options.response_key).get("content")
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
    if isinstance(reward, int | float) and not math.isnan(reward):
        known["reward"] = float(reward)
    if row.get("sample_weight") is not None:
        known["sample_weight"] = weight_of(plain(row["sample_weight"]), "sample_weight")
    return known


def _check_supervised(
    messages: Sequence[Message], supervise: Sequence[int] | None, weights: Sequence[float] | None
) -> None:
    if supervise is None:
        if not any(m.role == "assistant" for m in messages):
            raise BadRowError("messages", "NO_ASSISTANT", "there is no assistant message to learn")
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


def weight_of(value: Any, field: str) -> float:
    """A loss weight given as a number or a flag.

    Raises:
        BadRowError: it is neither, or negative.
    """
    if not isinstance(value, bool | int | float) or not math.isfinite(value) or value < 0:
        fix = "Use true, false or a number of at least 0"
        raise BadRowError(field, "BAD_WEIGHT", f"{value!r:.40} is not a weight", fix)
    return float(value)


def _sequence(value: Any, field: str) -> list[Any]:
    value = plain(value)
    if isinstance(value, str):
        value = _json(value, field)
    if not isinstance(value, list):
        raise BadRowError(field, "NOT_A_LIST", f"expected a list, found {type(value).__name__}")
    return value


def _struct(value: Any, field: str) -> JSON:
    if isinstance(value, str):
        value = _json(value, field)
    if not isinstance(value, dict):
        raise BadRowError(field, "BAD_TYPE", f"expected an object, found {type(value).__name__}")
    return value


def _json(text: str, field: str) -> Any:
    try:
        return load_json(text)
    except ValueError as error:
        raise BadRowError(field, "BAD_JSON", f"not JSON: {error}") from error


def plain(value: Any) -> Any:
    """Numpy values as Python ones, tuples as lists."""
    if type(value) in _LEAVES:  # nearly all values
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def without_nulls(value: Any) -> Any:
    """As `plain`, and without the nulls of structs: Arrow invents them for other rows' keys."""
    if type(value) in _LEAVES:
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    return value
