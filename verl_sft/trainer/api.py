"""Training from Python: `SFTTrainer(config, train_dataset=...).train()`, the run of the command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist

from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.data.load import read_options
from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World, setup_world
from verl_sft.errors import InputError, UsageError
from verl_sft.records.build import record_id
from verl_sft.records.io import write_parquet
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.custom import as_record
from verl_sft.records.values import BadRowError, without_nulls
from verl_sft.safe_io import make_output_dir
from verl_sft.trainer.fsdp_sft_trainer import run
from verl_sft.trainer.stopping import handlers_kept


class SFTTrainer:
    """One training run in this process, or in each process that torchrun started.

    A data set given here is written once into the run directory and trained from there, so that
    masks are proven, a resumed run reads the same rows, and every rank sees the same data.

    Args:
        config: a `TrainConfig`, its keys as a (nested or dotted) dict, or `key=value` words.
        train_dataset: records, as `SFTRecord` or plain dicts (`messages`, or a prompt and a
            response as `data.prompt_key` and `data.response_key` name them), or a
            `datasets.Dataset` or pandas `DataFrame` of such rows; None: `data.train_files`. An
            iterator that can be read only once is read only once.
        val_dataset: the same for validation; None: `data.val_files`.

    Raises:
        UsageError: a key or value of the config is wrong, or a data set is none.
    """

    def __init__(
        self,
        config: TrainConfig | Mapping[str, Any] | Sequence[str],
        *,
        train_dataset: Iterable[Any] | None = None,
        val_dataset: Iterable[Any] | None = None,
    ) -> None:
        self.config = config if isinstance(config, TrainConfig) else read_config(config)
        self.train_dataset = _rows(train_dataset, name="train_dataset")
        self.val_dataset = _rows(val_dataset, name="val_dataset")

    def train(self) -> Path:
        """Train to the end, resuming where an earlier call was stopped; returns the run directory.

        Raises:
            VerlSftError: as the command would report it; nothing is printed twice.
        """
        already = dist.is_initialized()
        try:
            world = setup_world(self.config.trainer.device)
            config = self._with_files(world)
            with handlers_kept(), ExitStack() as stack:
                run(config, world=world, stack=stack, owned=[])
            return Path(config.trainer.default_local_dir).expanduser()
        finally:
            if dist.is_initialized() and not already:
                dist.destroy_process_group()

    def _with_files(self, world: World) -> TrainConfig:
        """The config with given data sets as files of the run directory."""
        data = self.config.data
        folder = Path(self.config.trainer.default_local_dir).expanduser() / "datasets"
        options = read_options(data)
        changes: dict[str, Any] = {}
        with together(world):
            for split, rows in (("train", self.train_dataset), ("val", self.val_dataset)):
                if rows is None:
                    continue
                rows, whole = _peek(rows, options=options)
                if whole:
                    options = replace(options, multiturn=True)
                    changes["multiturn"] = replace(data.multiturn, enable=True)
                path = folder / f"{split}.parquet"
                changes[f"{split}_files"] = {"path": str(path), "format": "own"}
                if world.is_main:
                    make_output_dir(folder)
                    write_parquet(path, to_records(rows, options=options, name=split))
        if "train_files" in changes and self.val_dataset is None:
            changes["val_files"] = data.val_files or "none"
        return replace(self.config, data=replace(data, **changes)) if changes else self.config


def _rows(given: Any, *, name: str) -> Iterable[Any] | None:
    """A data set as rows; a `DataFrame` iterates over its columns, which are none.

    Raises:
        UsageError: it is a path, several splits, or nothing that has rows.
    """
    if given is None:
        return None
    if type(given).__module__.partition(".")[0] == "pandas" and hasattr(given, "to_dict"):
        return list(given.to_dict("records"))
    if isinstance(given, str | bytes | Path | Mapping) or not isinstance(given, Iterable):
        raise UsageError(
            f"{name} is of type {type(given).__name__}, which holds no rows",
            fix="Give a list of dicts or records; files belong into data.train_files, and of "
            "several splits one is chosen by its name",
        )
    return given


def _peek(rows: Iterable[Any], *, options: ReadOptions) -> tuple[Iterable[Any], bool]:
    """The same rows, and whether the first is a whole conversation and not a pair."""
    if not isinstance(rows, Iterator):
        first = next(iter(rows), None)
    else:
        first = next(rows, None)
        rows = chain([] if first is None else [first], rows)
    if isinstance(first, SFTRecord):
        return rows, first.prompt is None
    known = first if isinstance(first, Mapping) else {}
    return rows, options.messages_key in known and options.prompt_key not in known


def to_records(
    rows: Iterable[Any], *, options: ReadOptions, name: str = "train"
) -> Iterator[SFTRecord]:
    """Records of a data set in memory, each with an id.

    Raises:
        InputError: a row cannot be used; it is named by its place.
    """
    from_arrow = type(rows).__module__.partition(".")[0] == "datasets"
    for number, row in enumerate(rows):
        try:
            record = as_record(without_nulls(row) if from_arrow else row, options=options)
        except BadRowError as bad:
            where = f"{name}_dataset:{number}:{bad.field}".rstrip(":")
            raise InputError(bad.message, where=where, why=bad.code, fix=bad.fix) from bad
        yield record if record.record_id else replace(record, record_id=record_id(record))


def read_config(given: Mapping[str, Any] | Sequence[str]) -> TrainConfig:
    """A config from its keys, nested or dotted, or from `key=value` words.

    Raises:
        UsageError: as the command.
    """
    if not isinstance(given, Mapping):
        return load_config(TrainConfig, list(given))
    return load_config(TrainConfig, [], values=dict(given))
