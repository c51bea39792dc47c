"""What a data format is: how to recognise its rows, read them, and write them where it can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """One row format of some tool; every function is pure.

    Attributes:
        name: what `data.format` and `convert from=` say.
        about: one line for `convert --help`.
        detect: whether a row is of this format, by its keys and types.
        read: a row to its records, raising `BadRowError` for a row that cannot be used, or giving
            it in place of one of several records; the caller fills in their `source`.
        write: a record to the rows that `read` gives it back from, raising `BadRowError` for what
            the format cannot hold; None where there is no writer.
        suffix: of the files that `write` makes: .jsonl, .json (one array) or .parquet.
        structs: columns that its tool reads as lists and structs of Arrow, never as JSON text.
        whole: of a tool whose file is one object: all rows of a file as that object.
    """

    name: str
    about: str
    detect: Callable[[JSON], bool]
    read: Callable[[JSON, ReadOptions], Iterable[SFTRecord | BadRowError]]
    write: Callable[[SFTRecord], Iterable[JSON]] | None = None
    suffix: str = ".jsonl"
    structs: tuple[str, ...] = ()
    whole: Callable[[Iterable[JSON]], JSON] | None = None
