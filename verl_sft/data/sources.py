"""What the `data` section reads: sources of the training rows and of every validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from verl_sft.config.checks import naming
from verl_sft.config.train import DataConfig
from verl_sft.data.load import read_options
from verl_sft.errors import UsageError
from verl_sft.records.hold_out import hold_out
from verl_sft.records.mix import Source, resolve_sources
from verl_sft.records.mongo import database_reader, mongo_sources

_FROM_MONGO = "mongo"  # the validation set of `data.mongo.val_filter` beside sets with names


def open_sources(
    config: DataConfig,
    *,
    cache: Path,
    say: Callable[[str], None] = print,
) -> tuple[list[Source], dict[str, list[Source]]]:
    """Training sources and those of each validation set by name ("": the only one).

    Args:
        config: files, collections, and how much to hold out.
        cache: where exports of collections and cuts are kept.
        say: told what was exported.

    Raises:
        UsageError: nothing is named, or a value is wrong.
        InputError: something is not there.
    """
    if config.train_files in (None, "", []) and not config.mongo.uri:
        raise UsageError(
            "no training data given",
            where="data.train_files",
            fix="Give an sft_data directory, files, a list of them, or data.mongo.uri",
        )

    def named(spec: Any, split: str) -> list[Source]:
        database = database_reader(config.mongo, split, folder=cache / "mongo", say=say)
        with naming(f"data.{split}_files"):
            return resolve_sources(spec, split=split, database=database)

    def mongo(split: str) -> list[Source]:
        return mongo_sources(config.mongo, split, folder=cache / "mongo", say=say)

    train = [*named(config.train_files or [], "train"), *mongo("train")]
    if config.val_size:
        options = read_options(config)
        size, chosen = config.val_size, config.val_seed
        train, held = hold_out(train, size=size, seed=chosen, options=options, folder=cache)
        return train, {"": held}
    sets: dict[str, list[Source]] = {}
    for name, spec in named_sets(config.val_files).items():
        if spec is None:
            sets[name] = _beside(train[0])
        else:
            sets[name] = [] if spec in ("", "none") else named(spec, "val")
    if found := mongo("val"):
        name = "" if list(sets) == [""] else _FROM_MONGO
        sets[name] = [*sets.get(name, []), *found]
    return train, {name: found for name, found in sets.items() if found}


def named_sets(spec: Any) -> dict[str, Any]:
    """The sets that a `data.val_files` value names: `{name: files}`, or one without a name.

    Raises:
        UsageError: a name that cannot be part of a metric's name.
    """
    if not isinstance(spec, Mapping) or "path" in spec:
        return {"": spec}
    for name in map(str, spec):
        if not name or "/" in name or name.startswith("loss"):
            raise UsageError(
                f"data.val_files: a validation set cannot be called '{name}'",
                why="Its loss would be val/NAME/loss",
                fix="Use a short word",
            )
    return {str(name): files for name, files in spec.items()}


def _beside(train: Source) -> list[Source]:
    """The validation files in the directory of the first training file."""
    folder = train.files[0].parent
    found = sorted(folder.glob("val.parquet")) or sorted(folder.glob("val-*.parquet"))
    return [Source(tuple(found))] if found else []
