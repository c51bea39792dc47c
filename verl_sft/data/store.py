"""The token cache on disk: flat arrays that every rank maps read-only.

<cache_dir>/<key>/ids.i32 weights.f32   all samples behind one another, unshifted
                  labels.u8             what each token is (data/kinds.py)
                  offsets.i64           where each begins, and the end
                  names.bin names.i64   `record_id LF source` of each sample
                  flags.u8              TRUNCATED, LOST_STOP and SPLIT of each sample
                  groups.u8             number of each sample's source in report.json's `groups`
                  rejected.jsonl        rows that were refused, with reason and fix
                  report.json key.json  counts; everything that the tokens depend on
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from verl_sft.data.kinds import SOURCE
from verl_sft.data.sample import TokenizedSample, learned_spans
from verl_sft.errors import StorageError
from verl_sft.safe_io import dump_json, storage_error

TRUNCATED, LOST_STOP, SPLIT = 1, 2, 4  # SPLIT: one of several views of its conversation
_FILES = (
    "ids.i32",
    "weights.f32",
    "labels.u8",
    "offsets.i64",
    "names.bin",
    "names.i64",
    "flags.u8",
    "groups.u8",
)
MOST_GROUPS = 64  # sources that losses are told apart by; the rest counts as the last one
_BLOCK = 1024  # samples looked at together


@dataclass(slots=True)
class LoadReport:
    """What became of the rows.

    `rows` were read, `folded` of them went into a longer row of their episode; `split` of the
    `samples` are one of several views of a conversation; `turns` were learned, `lost_stops` of
    them without their stop token; `rejected` and `dropped` count rows by reason (dropped: too long
    under `data.truncation=drop`); `mix` counts records by source, as `read_mix` does.
    """

    rows: int = 0
    folded: int = 0
    samples: int = 0
    split: int = 0
    turns: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated: int = 0
    lost_stops: int = 0
    without_stop: int = 0
    escaped: int = 0
    longest: int = 0
    template: str = ""
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    mix: Counter[str] = field(default_factory=Counter)

    def add(self, other: LoadReport) -> None:
        """Add the counts of another part of the rows."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.rejected.update(other.rejected)
        self.dropped.update(other.dropped)

    @property
    def num_rejected(self) -> int:
        """Rows refused for any reason."""
        return sum(self.rejected.values())


class SampleStore:
    """Samples by index; holds no more memory than the pages that were touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            saved = json.loads((path / "report.json").read_text(encoding="utf-8"))
            sizes = {name: (path / name).stat().st_size for name in _FILES}
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        self.groups: tuple[str, ...] = tuple(saved.pop("groups", ()))
        if sizes != saved.pop("sizes"):
            raise _damaged(path, "its files do not have the sizes they were written with")
        self.report = LoadReport(**{k: v for k, v in saved.items() if k not in _COUNTERS})
        for name in _COUNTERS:
            getattr(self.report, name).update(saved[name])
        self._ids = _mapped(path / "ids.i32", dtype=np.int32)
        self._weights = _mapped(path / "weights.f32", dtype=np.float32)
        self._labels = _mapped(path / "labels.u8", dtype=np.uint8)
        self._group = _mapped(path / "groups.u8", dtype=np.uint8)
        self._offsets = _mapped(path / "offsets.i64", dtype=np.int64)
        self._names = _mapped(path / "names.bin", dtype=np.uint8)
        self._name_offsets = _mapped(path / "names.i64", dtype=np.int64)
        self.flags = _mapped(path / "flags.u8", dtype=np.uint8)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each shifted sample, int64 [N]."""
        lengths: npt.NDArray[np.int64] = np.diff(self._offsets) - 1
        return lengths

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> TokenizedSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ids = self._ids[self._offsets[index] : self._offsets[index + 1]]
        shifted = slice(self._offsets[index] + 1, self._offsets[index + 1])
        weights = self._weights[shifted]
        record_id, source = self._name(index)
        return TokenizedSample(
            record_id=record_id,
            input_ids=ids[:-1],
            target_ids=ids[1:],
            weights=weights,
            source=source,
            spans=learned_spans(weights),
            labels=self._labels[shifted] + np.int32(SOURCE * int(self._group[index])),
        )

    def input_ids(self, index: int) -> npt.NDArray[np.int32]:
        """Those of one sample, without the rest of it."""
        ids: npt.NDArray[np.int32] = self._ids[self._offsets[index] : self._offsets[index + 1] - 1]
        return ids

    def source(self, index: int) -> str:
        """`file:row` of the record that a sample was made from."""
        return self._name(index)[1]

    def _name(self, index: int) -> tuple[str, str]:
        name = self._names[self._name_offsets[index] : self._name_offsets[index + 1]]
        record_id, _, source = name.tobytes().decode("utf-8", "surrogatepass").rpartition("\n")
        return record_id, source

    def __iter__(self) -> Iterator[TokenizedSample]:
        return (self[index] for index in range(len(self)))

    def units(self) -> npt.NDArray[np.int64]:
        """Number of the conversation of each sample, int64 [N]; the views of one are neighbours."""
        starts = np.ones(len(self), dtype=np.int64)
        for index in np.flatnonzero(self.flags[1:] & self.flags[:-1] & SPLIT).tolist():
            starts[index + 1] = self._name(index) != self._name(index + 1)
        return starts.cumsum() - 1

    def num_learned(self) -> npt.NDArray[np.int64]:
        """Learned tokens of each sample, int64 [N]; reads all weights once."""
        counts = np.zeros(len(self), dtype=np.int64)
        for first in range(0, len(self), _BLOCK):
            starts = self._offsets[first : first + _BLOCK + 1]
            learned = self._weights[starts[0] : starts[-1]] != 0
            starts = starts[:-1] - starts[0]
            learned[starts] = False  # nothing says the first token
            counts[first : first + _BLOCK] = np.add.reduceat(learned, starts, dtype=np.int64)
        return counts


class StoreWriter:
    """Appends samples to a directory that is not published yet; memory stays flat."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.path = path
        self._ids, self._weights, self._labels, self._names, self._flags, self._groups = (
            (path / name).open("wb")
            for name in (
                "ids.i32", "weights.f32", "labels.u8", "names.bin", "flags.u8", "groups.u8",
            )
        )  # fmt: skip
        self._rejected = (path / "rejected.jsonl").open("w", encoding="utf-8")
        self._offsets, self._name_offsets = array("q", [0]), array("q", [0])
        self._group_names: dict[str, int] = {}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams():
            stream.close()

    def _streams(self) -> tuple[IO[Any], ...]:
        return (
            self._ids, self._weights, self._labels, self._names, self._flags, self._groups,
            self._rejected,
        )  # fmt: skip

    def add(
        self,
        ids: bytes,
        *,
        weights: bytes,
        labels: bytes,
        lengths: Sequence[int],
        names: Sequence[str],
        groups: Sequence[str],
        flags: Sequence[int],
    ) -> None:
        """Append samples whose tokens lie behind one another (int32, float32 and uint8 bytes)."""
        self._ids.write(ids)
        self._weights.write(weights)
        self._labels.write(labels)
        self._flags.write(bytes(flags))
        self._groups.write(bytes(map(self._group_number, groups)))
        for length, name in zip(lengths, names, strict=True):
            self._offsets.append(self._offsets[-1] + length)
            encoded = name.encode("utf-8", "surrogatepass")
            self._names.write(encoded)
            self._name_offsets.append(self._name_offsets[-1] + len(encoded))

    def _group_number(self, name: str) -> int:
        known = self._group_names
        if name not in known and len(known) >= MOST_GROUPS - 1:
            name = "others"
        return known.setdefault(name, len(known))

    def reject(self, row: dict[str, Any]) -> None:
        """Note a refused row."""
        self._rejected.write(dump_json(row) + "\n")

    def finish(self, report: LoadReport, *, key: dict[str, Any]) -> None:
        """Write offsets, counts and key; the directory is then complete."""
        (self.path / "offsets.i64").write_bytes(self._offsets.tobytes())
        (self.path / "names.i64").write_bytes(self._name_offsets.tobytes())
        try:
            for stream in self._streams():
                stream.close()
        except OSError as error:
            raise storage_error(error, self.path) from error
        sizes = {name: (self.path / name).stat().st_size for name in _FILES}
        counts = {f.name: getattr(report, f.name) for f in fields(report)}
        saved = {**counts, "sizes": sizes, "groups": list(self._group_names)}
        text = dump_json(saved, indent=1)
        (self.path / "report.json").write_text(text, encoding="utf-8")
        (self.path / "key.json").write_text(dump_json(key, indent=1), encoding="utf-8")


_COUNTERS = ("rejected", "dropped", "mix")
_SUMS = (
    "rows",
    "folded",
    "samples",
    "split",
    "turns",
    "tokens",
    "learned_tokens",
    "truncated",
    "lost_stops",
    "without_stop",
    "escaped",
)


def _mapped(path: Path, *, dtype: type[np.generic]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # plain arrays are sliced faster


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(
        "the token cache is damaged",
        where=str(path),
        why=why,
        fix="Delete this directory; it is built again from the data",
    )
