"""From `key=value` words to a validated config tree.

Hydra's grammar parses the words (quotes, lists, null, `+key`, `++key`, `~key`), the dataclass tree
decides what exists. Nothing below an entry point sees a DictConfig.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from verl_sft.config.dialects import ALIASES, translate
from verl_sft.config.flags import PREFIXES, split_flags, translate_flags
from verl_sft.config.llamafactory import read_llamafactory, take_changes
from verl_sft.config.secrets import DATABASES, hidden
from verl_sft.errors import UsageError, VerlSftError

T = TypeVar("T")


def load_config(
    schema: type[T],
    words: Sequence[str],
    *,
    say: Callable[[str], None] | None = None,
    world_size: int | None = None,
    values: Mapping[str, Any] | None = None,
) -> T:
    """Build `schema` from its defaults, files, `values` and `key=value` words, in that order.

    Files are `--config FILE.yaml` with our keys and `--llamafactory FILE.yaml` with theirs, whose
    batch size is per process (`world_size`; default: what torchrun says), beside which their own
    arguments may stand among the words. A section given a plain
    name (`env=alfworld`) sets its `name`. `values` has nested or dotted keys. `say` hears of every
    key of another dialect that was translated or has no effect.

    Raises:
        UsageError: unknown key (with the nearest known one), wrong type, or a value out of range.
    """
    from omegaconf import OmegaConf

    tree = OmegaConf.structured(schema)
    known = dict(config_keys(schema))
    files, overrides = _split_config_files(words)
    theirs: dict[str, Any] = {}
    if any(option == "--llamafactory" for option, _ in files):
        theirs, overrides = take_changes(overrides, known)
    ranks = world_size or int(os.environ.get("WORLD_SIZE", 1))
    try:
        for option, path in files:
            if option == "--llamafactory":
                found = read_llamafactory(path, world_size=ranks, changes=theirs)
                for note in found.notes:
                    _tell(say, note)
                given: Iterable[tuple[str, Any]] = found.values.items()
            else:
                given = _flatten(_read_yaml(path))
            for key, value in given:
                _set(tree, known, key, value, say)
        for key, value in _flatten(values or {}):
            _set(tree, known, key, value, say)
        flags, overrides = split_flags(overrides)
        parsed = list(_parse(overrides, defaults=OmegaConf.structured(schema)))
        for key, value in parsed:  # `training.*` keys say the same things as flags
            if name := next((key.removeprefix(p) for p in PREFIXES if key.startswith(p)), ""):
                flags[name] = value
        for key, value, note in translate_flags(flags, world_size=ranks):
            _tell(say, note)
            if key:
                _set(tree, known, key, value, say)
        for key, value in parsed:
            if not key.startswith(PREFIXES):
                _set(tree, known, key, value, say)
        return cast(T, OmegaConf.to_object(tree))
    except VerlSftError as error:
        for part in ("what", "where", "why", "fix"):  # they may quote a word with a password
            setattr(error, part, hidden(getattr(error, part)))
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("omegaconf", "hydra")):
            raise
        text = hidden(str(error).splitlines()[0])
        raise UsageError(f"the configuration is not valid: {text}") from error


def config_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, type | None]]:
    """Every dotted key of a config tree, with the dataclass behind it if it is a section."""
    hints = get_type_hints(schema)
    for item in fields(cast(Any, schema)):
        key = f"{prefix}{item.name}"
        hint = hints[item.name]
        section = hint if is_dataclass(hint) else None
        yield key, cast("type | None", section)
        if section is not None:
            yield from config_keys(cast(type, section), f"{key}.")


def _parse(words: Sequence[str], *, defaults: Any) -> Iterator[tuple[str, Any]]:
    """Key and value of each word; `~key` gives a key its default back."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    parser = OverridesParser.create()
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise UsageError(
                f"'{word}' is not understood",
                fix="Write options as key=value; see --help for the keys",
            )
        try:
            override = parser.parse_override(_quoted(word))
        except HydraException as error:
            why = str(error).splitlines()[0]
            if "://" in word and "@" in word:  # both may hold a password that a quote divides
                word, why = f"{word.partition('=')[0]}=***", "its quotes or brackets do not match"
            raise UsageError(
                f"cannot read '{word}': {why}",
                fix="Quote values that hold spaces, commas or brackets: \"key='a, b'\"",
            ) from error
        key = override.key_or_group
        if override.is_delete():
            yield key, OmegaConf.select(defaults, key)
        elif override.is_sweep_override():
            raise UsageError(
                f"cannot read '{word}': it holds more than one value",
                fix=f"Write a list as {key}=[a,b], and quote a value with commas: \"{key}='a, b'\"",
            )
        else:
            yield key, override.value()


def _quoted(word: str) -> str:
    """Paths with characters that Hydra's grammar reserves are quoted, as a shell user expects."""
    key, sign, value = word.partition("=")
    if not sign or not value or value[0] in "'\"[{" or (value[0] == "$" and value.isascii()):
        return word
    if "," in value and not value.startswith(DATABASES):  # one of these may name several hosts
        return word
    if "," in value or not value.isascii() or any(c in value for c in " ()#&~^;?*!<>|@='\""):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return word


def _set(
    tree: Any,
    known: dict[str, type | None],
    key: str,
    value: Any,
    say: Callable[[str], None] | None,
) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    section = known.get(key)
    if section is not None and isinstance(value, str) and f"{key}.name" in known:
        key = f"{key}.name"
    canonical: str | None = key
    if key not in known or (section is not None and not isinstance(value, dict)):
        canonical, value, note = translate(key, value)
        _tell(say, note)
    if canonical is None:
        return
    parent = canonical.rpartition(".")[0]
    free_form = parent in known and known[parent] is None
    if canonical not in known and not free_form:
        raise _unknown_key(key, known)
    if isinstance(value, str):
        if value.startswith("~/"):  # the shell leaves it alone behind `key=`
            value = str(Path(value).expanduser())
        if OmegaConf.is_list(OmegaConf.select(tree, canonical)) and not value.startswith("${"):
            value = [value]
    try:
        OmegaConf.update(tree, canonical, value, force_add=free_form)
    except OmegaConfBaseException as error:
        if isinstance(value, str) and "is not a ListConfig" in str(error):  # a list that was null
            OmegaConf.update(tree, canonical, [value])
            return
        raise UsageError(f"{key}={value}: {str(error).splitlines()[0]}") from error


def _tell(say: Callable[[str], None] | None, note: str) -> None:
    if note and say is not None:
        say(note)


def _unknown_key(key: str, known: dict[str, type | None]) -> UsageError:
    names = [k for k, section in known.items() if section is None]
    if "data.max_length" in known:  # the training keys have names in other dialects
        names += ALIASES
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    leaf = key.rpartition(".")[2]
    near += [n for n in names if n.rpartition(".")[2] == leaf and n not in near]
    hint = f"Did you mean {' or '.join(near[:3])}?" if near else "See --help for all keys"
    return UsageError(f"unknown key '{key}'", fix=hint)


def _split_config_files(words: Sequence[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    files: list[tuple[str, Path]] = []
    rest: list[str] = []
    pending = iter(words)
    for word in pending:
        option, sign, name = word.partition("=")
        if option in ("--config", "--llamafactory"):
            name = name if sign else next(pending, "")
            if not name:
                raise UsageError(f"{option} needs a file name")
            files.append((option, Path(name).expanduser()))
        else:
            rest.append(word)
    return files, rest


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if not path.is_file():
        raise UsageError("no such configuration file", where=str(path))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        why = " ".join(str(error).split())
        raise UsageError("the file is not valid YAML", where=str(path), why=why) from error
    if not isinstance(content, dict):
        raise UsageError("the file holds no key: value pairs", where=str(path))
    return cast("dict[str, Any]", content)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value
