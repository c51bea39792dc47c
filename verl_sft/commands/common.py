"""What all commands share: reading their words, `--help`, `--dry-run`, and progress."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from verl_sft.config.load import load_config

T = TypeVar("T")


def read_words(
    schema: type[T],
    words: Sequence[str],
    *,
    usage: str,
    world_size: int | None = None,
    told_later: bool = False,
    names: Mapping[str, str] | None = None,
) -> T | None:
    """The command's config, or None after `--help` or `--dry-run` was answered.

    `world_size` is the number of processes that the command will start, `told_later` that one of
    them says which keys were translated, `names` the words that stand for fields whose own names
    Python could not take (`in`).

    Raises:
        UsageError: as `load_config`.
    """
    names = names or {}
    if any(w in ("-h", "--help") for w in words):
        print(f"usage: {usage}\n\nKeys and their defaults:")
        print("\n".join(_key_lines(schema(), names={field: word for word, field in names.items()})))
        return None
    rest = [_renamed(w, names) for w in words if w != "--dry-run"]
    dry = len(rest) < len(words)
    silent = told_later and not dry
    config = load_config(schema, rest, say=None if silent else say, world_size=world_size)
    if dry:
        print(to_yaml(config), end="")
        return None
    return config


def default_ranks(words: Sequence[str]) -> int | None:
    """As many ranks as `train` starts here, if batch sizes among the words may be per process."""
    ours = ("--dry-run", "--help", "--debug")
    if not any(w.startswith(("--", "training.")) and w not in ours for w in words):
        return None
    from verl_sft.trainer.launch import default_nproc

    return default_nproc()


def say(line: str) -> None:
    """Tell the user something that is neither result nor error."""
    print(line, file=sys.stderr, flush=True)


def to_yaml(config: Any) -> str:
    """A config as YAML."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


class Progress:
    """A bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, title: str) -> None:
        self._title, self._shown = title, -1
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        tenth = 10 * done // max(total, 1)
        if tenth != self._shown:
            self._shown = tenth
            say(f"{self._title}: {done}/{total} {note}".rstrip())


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Show progress on standard error while the block runs."""
    shown = Progress(title)
    if not sys.stderr.isatty():
        yield shown
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        shown._bar, shown._task = bar, bar.add_task(title, total=None, note="")
        yield shown


def _renamed(word: str, names: Mapping[str, str]) -> str:
    key, sign, value = word.partition("=")
    return f"{names[key]}={value}" if sign and key in names else word


def _key_lines(section: Any, prefix: str = "", *, names: Mapping[str, str]) -> Iterator[str]:
    """One line per key of a config instance; the comments are those of its source."""
    source = inspect.getsource(type(section))
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", source, re.M))
    for item in fields(section):
        value, key = getattr(section, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from _key_lines(value, f"{key}.", names={})
            continue
        shown = "null" if value is None else value
        comment = comments.get(item.name, "")
        yield f"  {names.get(key, key)}={shown}" + (f"   # {comment}" if comment else "")
