"""`verl-sft convert in=FILES out=DIR [from=NAME] [to=NAME]`: data of one tool for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from verl_sft.commands.common import read_words, say
from verl_sft.config.convert import ConvertConfig
from verl_sft.errors import InputError, UsageError

_WORDS = {"in": "inputs", "from": "source", "to": "target"}


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = "verl-sft convert in=FILES out=DIR_OR_FILE [from=FORMAT] [to=FORMAT] [key=value ...]"
    config = read_words(ConvertConfig, [_renamed(word) for word in words], usage=usage)
    if config is None:
        if any(w in ("-h", "--help") for w in words):
            print("\nFormats:\n" + "\n".join(_format_lines()))
        return 0
    if not config.inputs or not config.out:
        raise UsageError("in= and out= are needed", fix=f"usage: {usage}")
    from verl_sft.records.convert import ConvertReport
    from verl_sft.records.parse import Reject
    from verl_sft.records.values import LEFT_OUT
    from verl_sft.safe_io import dump_json, make_output_dir, publishing

    out = Path(config.out).expanduser()
    beside = make_output_dir(out if _is_directory(config, out) else out.parent)
    report = ConvertReport()
    with publishing(beside / "rejected.jsonl") as temporary, temporary.open("w") as stream:
        refused: set[Reject] = set()  # the records may be read twice

        def reject(bad: Reject) -> None:
            if bad in refused:
                return
            refused.add(bad)
            report.refused[bad.code] += 1
            row = {name: getattr(bad, name) for name in Reject.__slots__}
            stream.write(dump_json(row) + "\n")

        notes = _convert(config, out, report=report, reject=reject)
    for line in notes:
        say(line)
    _tell(report, beside)
    wrong = sum(count for code, count in report.refused.items() if code not in LEFT_OUT)
    if wrong > config.max_reject_fraction * max(report.total, 1):
        raise InputError(
            f"{wrong} of {report.total} rows were refused",
            where=str(beside / "rejected.jsonl"),
            why=f"More than max_reject_fraction={config.max_reject_fraction}",
            fix="The file says for each row what to change; the others were written",
        )
    return 0


def _convert(
    config: ConvertConfig, out: Path, *, report: object, reject: Callable[..., None]
) -> list[str]:
    from verl_sft.records import convert
    from verl_sft.records.parse import ReadOptions
    from verl_sft.records.read import find_format, read_records
    from verl_sft.records.schema import SFTRecord
    from verl_sft.records.select import balanced, select

    assert isinstance(report, convert.ConvertReport)
    files = _all_files(config.inputs)
    formats = {**asdict(config.agentrl), **asdict(config.raw)}
    options = ReadOptions(multiturn=True, format=config.source, **formats)
    target = find_format(config.target)

    def chosen() -> Iterator[SFTRecord]:
        report.duplicates, report.dropped = 0, Counter()  # the records may be read twice
        found = convert.named(read_records(files, options=options, reject=reject))
        found = select(found, config=config.select, dropped=report.dropped)
        if config.view == "per_turn":
            found = convert.per_turn(found)
        return convert.unique(found, report) if config.dedup else found

    def records() -> Iterator[SFTRecord]:
        kept = chosen()
        if by := config.select.balance:
            kept = balanced(chosen, by=by, seed=config.seed, dropped=report.dropped)
        return islice(kept, None if config.max_rows < 0 else config.max_rows)

    if _is_directory(config, out):
        return convert.write_split(
            out, records, val_fraction=config.val_fraction, seed=config.seed, report=report
        )
    convert.write_file(out, records(), target=target, report=report, reject=reject)
    return []


def _all_files(spec: Any) -> list[Path]:
    """The files that `in=` names; of an sft_data directory train and val."""
    from verl_sft.records.resolve import resolve_files

    files = resolve_files(spec, split="train")
    place = Path(str(spec)).expanduser()
    if place.is_dir():
        files += sorted(place.glob("val.parquet")) or sorted(place.glob("val-*.parquet"))
    return files


def _is_directory(config: ConvertConfig, out: Path) -> bool:
    return config.target == "own" and (out.is_dir() or not out.suffix)


def _tell(report: object, beside: Path) -> None:
    from verl_sft.records.convert import ConvertReport

    assert isinstance(report, ConvertReport)
    written = ", ".join(f"{name} {count}" for name, count in report.written.items()) or "nothing"
    print(f"written: {written}; repeated: {report.duplicates}")
    if report.dropped:
        print("dropped: " + ", ".join(f"{k} {n}" for k, n in report.dropped.most_common()))
    if report.refused:
        reasons = ", ".join(f"{code} {count}" for code, count in report.refused.most_common())
        print(f"refused: {reasons}; see {beside / 'rejected.jsonl'}")


def _renamed(word: str) -> str:
    key, sign, value = word.partition("=")
    return f"{_WORDS[key]}={value}" if sign and key in _WORDS else word


def _format_lines() -> Iterator[str]:
    from verl_sft.records.read import find_format
    from verl_sft.registry import SOURCES

    for name in SOURCES:
        found = find_format(name)
        yield f"  {name:<12} {found.about}{'' if found.write else ' (read only)'}"
