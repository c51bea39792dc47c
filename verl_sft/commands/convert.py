"""`verl-sft convert in=FILES out=DIR [from=NAME] [to=NAME]`: data of one tool for another."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from verl_sft.commands.common import read_words, say
from verl_sft.config.checks import naming
from verl_sft.config.convert import ConvertConfig
from verl_sft.errors import InputError, UsageError

_NAMES = {"in": "inputs", "from": "source", "to": "target"}


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = "verl-sft convert in=FILES out=DIR_OR_FILE [from=FORMAT] [to=FORMAT] [key=value ...]"
    config = read_words(ConvertConfig, words, usage=usage, names=_NAMES)
    if config is None:
        if any(w in ("-h", "--help") for w in words):
            print("\nFormats:\n" + "\n".join(_format_lines()))
        return 0
    if not config.inputs or not config.out:
        raise UsageError("in= and out= are needed", fix=f"usage: {usage}")
    from verl_sft.records.convert import ConvertReport, NothingLeftError
    from verl_sft.records.parse import Reject
    from verl_sft.records.read import check_format
    from verl_sft.records.values import LEFT_OUT
    from verl_sft.safe_io import dump_json, make_output_dir, publishing

    check_format("from", config.source)
    check_format("to", config.target)
    out = Path(config.out).expanduser()
    with naming("in"):
        files = _all_files(config.inputs)
    refusals = _refusals(config, out)
    _check_output(config, out, files, refusals)
    make_output_dir(refusals.parent)
    report = ConvertReport()
    nothing: InputError | None = None
    with publishing(refusals) as temporary, temporary.open("w") as stream:
        refused: set[Reject] = set()  # the records may be read twice

        def reject(bad: Reject) -> None:
            if bad in refused:
                return
            refused.add(bad)
            report.refused[bad.code] += 1
            row = {name: getattr(bad, name) for name in Reject.__slots__}
            stream.write(dump_json(row) + "\n")

        try:
            for line in _convert(config, files, out, report=report, reject=reject):
                say(line)
        except NothingLeftError as error:  # the refused rows say why
            nothing = error
    _tell(report, refusals)
    wrong = sum(count for code, count in report.refused.items() if code not in LEFT_OUT)
    if wrong > config.max_reject_fraction * max(report.total, 1):
        raise InputError(
            f"{wrong} of {report.total} rows were refused",
            where=str(refusals),
            why=f"More than max_reject_fraction={config.max_reject_fraction}",
            fix="The file says for each row what to change; "
            + ("the others were written" if nothing is None else "nothing was written"),
        )
    if nothing is not None:
        raise nothing
    return 0


def _convert(
    config: ConvertConfig,
    files: list[Path],
    out: Path,
    *,
    report: object,
    reject: Callable[..., None],
) -> list[str]:
    from verl_sft.records import convert
    from verl_sft.records.file_set import check_versions, versions_of
    from verl_sft.records.parse import ReadOptions
    from verl_sft.records.read import find_format, read_records
    from verl_sft.records.schema import SFTRecord
    from verl_sft.records.select import balanced, select

    assert isinstance(report, convert.ConvertReport)
    formats = {**asdict(config.agentrl), **asdict(config.raw)}
    options = ReadOptions(multiturn=True, format=config.source, **formats)
    target = find_format(config.target)

    before = versions_of(files)

    def read() -> Iterator[SFTRecord]:
        yield from read_records(files, options=options, reject=reject)
        check_versions(before)

    def chosen() -> Iterator[SFTRecord]:
        report.duplicates, report.dropped = 0, Counter()  # the records may be read twice
        found = convert.named(read(), reject=reject)
        found = select(found, config=config.select, dropped=report.dropped)
        if config.view == "per_turn":
            found = convert.per_turn(found, dropped=report.dropped)
        return convert.unique(found, report) if config.dedup else found

    def records() -> Iterator[SFTRecord]:
        kept = chosen()
        if by := config.select.balance:
            kept = balanced(chosen, by=by, seed=config.seed, dropped=report.dropped)
        if config.order == "episode":
            kept = iter(convert.by_episode(kept))
        return islice(kept, None if config.max_rows < 0 else config.max_rows)

    if _is_directory(config, out):
        return convert.write_split(
            out,
            records,
            val_fraction=config.val_fraction,
            seed=config.seed,
            report=report,
            reject=reject,
        )
    convert.write_file(out, records(), target=target, report=report, reject=reject)
    return []


def _all_files(spec: Any) -> list[Path]:
    """The files that `in=` names; of an sft_data directory train and val."""
    from verl_sft.records.resolve import held_out_files, resolve_files

    return resolve_files(spec, split="train") + held_out_files(spec)


def _is_directory(config: ConvertConfig, out: Path) -> bool:
    """Whether `out` gets train and val; `data_v1.5` is a directory, `rows.jsonl` is none."""
    return config.target == "own" and (out.is_dir() or not out.suffix.strip(".0123456789"))


def _refusals(config: ConvertConfig, out: Path) -> Path:
    if _is_directory(config, out):
        return out / "rejected.jsonl"
    return out.with_name(f"{out.name}.rejected.jsonl")


def _check_output(config: ConvertConfig, out: Path, files: list[Path], refusals: Path) -> None:
    """Raise where an input would be overwritten: what is refused or dropped would be lost."""
    written = [out, refusals]
    if _is_directory(config, out):
        names = ("train.parquet", "train.csv", "val.parquet", "val.csv")
        written = [refusals, *(out / name for name in names)]
    inputs = {os.path.realpath(file) for file in files}  # other than resolve(), also of a loop
    for path in written:
        if os.path.realpath(path) in inputs:
            raise UsageError(
                "the output would replace an input",
                where=str(path),
                why="What is refused or filtered out would be lost",
                fix="Give another out=",
            )


def _tell(report: object, refusals: Path) -> None:
    from verl_sft.records.convert import ConvertReport

    assert isinstance(report, ConvertReport)
    written = ", ".join(f"{name} {count}" for name, count in report.written.items()) or "nothing"
    print(f"written: {written}; repeated: {report.duplicates}")
    if report.dropped:
        print("dropped: " + ", ".join(f"{k} {n}" for k, n in report.dropped.most_common()))
    if report.refused:
        reasons = ", ".join(f"{code} {count}" for code, count in report.refused.most_common())
        print(f"refused: {reasons}; see {refusals}")


def _format_lines() -> Iterator[str]:
    from verl_sft.records.read import find_format
    from verl_sft.registry import SOURCES

    for name in SOURCES:
        found = find_format(name)
        yield f"  {name:<12} {found.about}{'' if found.write else ' (read only)'}"
