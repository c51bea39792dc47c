"""The data sets of a LLaMA-Factory file: entries of `dataset_info.json` as sources of a mix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_sft.config.checks import one_of, whole
from verl_sft.errors import UsageError
from verl_sft.registry import unknown_name

# Columns of each kind of rows, by the names that entries use; what is not named is not read.
_ALWAYS = {"prompt": "instruction", "response": "output", "messages": "conversations"}
_COLUMNS = {
    "alpaca": ("prompt", "query", "response", "history", "system", "tools"),
    "sharegpt": ("messages", "system", "tools"),
}
_OPENAI = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_OTHER_MODES = ("images", "videos", "audios")
_PREFERENCES = ("chosen", "rejected", "kto_tag")
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url")
_FIELDS = (
    *("file_name", "hf_hub_url", "cloud_file_name", "formatting", "ranking", "subset", "split"),
    *("folder", "num_samples", "columns", "tags", *_ELSEWHERE),
)


def sources(names: Any, *, directory: Any, base: Path, max_samples: Any) -> list[dict[str, Any]]:
    """The sources that `dataset` or `eval_dataset` names, as objects of `data.train_files`.

    Args:
        names: of data sets, a list or text with commas.
        directory: `dataset_dir`: the folder of `dataset_info.json`, ONLINE, or its content.
        base: the file that names them; folders may be relative to it.
        max_samples: rows of each, or None.

    Raises:
        UsageError: a data set that is not described, or that cannot be read here.
    """
    wanted = split_names(names)
    if not wanted:
        return []
    if directory == "ONLINE":
        table: Mapping[str, Any] = {name: {"hf_hub_url": name} for name in wanted}
        folder, where = Path(), "dataset_dir=ONLINE"
    elif isinstance(directory, Mapping):
        table, folder, where = directory, base.parent, str(base)
    else:
        folder = near(directory, base)
        table, where = _table(folder / "dataset_info.json"), str(folder / "dataset_info.json")
    found = []
    for name in wanted:
        if name not in table:
            raise unknown_name("data set", name, table)
        if not isinstance(table[name], dict):
            raise UsageError(f"data set '{name}' is not described by an object", where=where)
        source = _source(name, table[name], folder=folder, where=f"{where}, {name}")
        cap = table[name].get("num_samples") or max_samples
        if cap:
            source["max_rows"] = whole("max_samples", cap)
        found.append(source)
    return found


def split_names(value: Any) -> list[str]:
    """Names given as a list, or as text with commas."""
    items = value if isinstance(value, list) else str("" if value is None else value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def near(name: Any, base: Path) -> Path:
    """A path of a file: as it stands, else relative to the file or to a folder above it."""
    given = Path(str(name)).expanduser()
    places = [given, *(parent / given for parent in base.absolute().parents)]
    return next((place for place in places if place.exists()), given)


def _table(path: Path) -> Mapping[str, Any]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read dataset_info.json: {error}",
            where=str(path),
            fix="Set dataset_dir to the folder that holds it",
        ) from error
    if not isinstance(listed, dict):
        raise UsageError("it holds no object of data sets", where=str(path))
    return listed


def _source(name: str, entry: Mapping[str, Any], *, folder: Path, where: str) -> dict[str, Any]:
    for key in entry:
        if key not in _FIELDS:
            raise unknown_name("field of a data set", str(key), _FIELDS)
    _check_kind(entry, where)
    kind = str(entry.get("formatting", "alpaca"))
    one_of("formatting", kind, (*_COLUMNS, "openai"))
    source: dict[str, Any] = {"path": _place(entry, folder, where), "name": name}
    given, tags = _names(entry, "columns", where), _names(entry, "tags", where)
    if kind == "openai":
        if given.get("messages", "messages") != "messages":
            fix = f"Set formatting: sharegpt, or data.multiturn.messages_key={given['messages']}"
            raise UsageError("formatting: openai reads the column 'messages'", where=where, fix=fix)
        if odd := {key: tag for key, tag in tags.items() if tag != _OPENAI.get(key)}:
            raise UsageError(f"formatting: openai has no tags {odd}", where=where)
        return {**source, "format": "verl"}
    chosen = {**_ALWAYS, **(given if "columns" in entry else {"query": "input"})}
    source["columns"] = {column: chosen.get(column, "") for column in _COLUMNS[kind]}
    return {**source, "format": kind, **({"tags": tags} if tags else {})}


def _check_kind(entry: Mapping[str, Any], where: str) -> None:
    columns = entry.get("columns") or {}
    if entry.get("ranking") or any(key in columns for key in _PREFERENCES):
        raise UsageError(
            "it holds preferences, for another kind of training",
            where=where,
            fix="Use a data set of answers, without ranking, chosen, rejected or kto_tag",
        )
    if other := [key for key in _OTHER_MODES if key in columns]:
        raise UsageError(
            f"columns: {other[0]} is not supported",
            where=where,
            why="Training is on text",
            fix="Use a data set without it",
        )
    chosen = {key: entry.get(key) for key in ("subset", "split")}
    odd = [key for key, value in chosen.items() if value not in (None, "", "train", "default")]
    if odd:
        raise UsageError(
            f"{odd[0]}={entry[odd[0]]} is not supported",
            where=where,
            fix="Fetch the rows that you mean into a file, and give it as file_name",
        )


def _place(entry: Mapping[str, Any], folder: Path, where: str) -> str | list[str]:
    """What holds the rows: the hub's name comes before a file's, as there."""
    if entry.get("hf_hub_url"):
        inside = f"/{entry['folder']}" if entry.get("folder") else ""
        return f"hf://datasets/{entry['hf_hub_url']}{inside}"
    for key in _ELSEWHERE:
        if entry.get(key):
            raise UsageError(
                f"{key}={entry[key]} is not supported",
                where=where,
                fix="Fetch the rows into a file, and give it as file_name",
            )
    if entry.get("cloud_file_name"):
        return str(entry["cloud_file_name"])
    if not entry.get("file_name"):
        raise UsageError("it has no file_name", where=where)
    path = folder / str(entry["file_name"])
    if path.is_dir():
        return [str(file) for file in sorted(path.iterdir()) if file.is_file()]
    return str(path)


def _names(entry: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    given = entry.get(key) or {}
    if not isinstance(given, Mapping):
        raise UsageError(f"{key}={given!r:.80}: not an object of names", where=where)
    return {str(name): str(value) for name, value in given.items() if value is not None}
