"""`verl-sft upload in=FILES to=mongodb uri=URI [from=FORMAT]`: records into a database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from verl_sft.commands.common import read_words
from verl_sft.config.checks import naming
from verl_sft.config.upload import UploadConfig
from verl_sft.errors import InputError, UsageError

_NAMES = {"in": "inputs", "from": "source"}


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = (
        "verl-sft upload in=FILES to=mongodb uri=URI [database=NAME] [collection=NAME] "
        "[from=FORMAT] [key=value ...]"
    )
    config = read_words(UploadConfig, words, usage=usage, names=_NAMES)
    if config is None:
        return 0
    if not config.inputs or not config.uri:
        raise UsageError("in= and uri= are needed", fix=f"usage: {usage}")
    from verl_sft.config.sources import MongoConfig
    from verl_sft.records.convert import named
    from verl_sft.records.mongo import connected
    from verl_sft.records.mongo_upload import UploadReport, upload
    from verl_sft.records.parse import ReadOptions, Reject
    from verl_sft.records.read import check_format, read_records
    from verl_sft.records.resolve import resolve_files
    from verl_sft.records.values import LEFT_OUT
    from verl_sft.safe_io import dump_json, make_output_dir, publishing

    check_format("from", config.source)
    with naming("in"):
        files = resolve_files(config.inputs, split="train")
    place = MongoConfig(config.uri, config.database, config.collection, timeout_s=config.timeout_s)
    formats = {**asdict(config.agentrl), **asdict(config.raw)}
    options = ReadOptions(multiturn=True, format=config.source, **formats)
    report, rejected = UploadReport(), Path(config.rejected).expanduser()
    make_output_dir(rejected.parent)
    with publishing(rejected) as temporary, temporary.open("w") as stream:

        def reject(bad: Reject) -> None:
            report.refused[bad.code] += 1
            row = {name: getattr(bad, name) for name in Reject.__slots__}
            stream.write(dump_json(row) + "\n")

        with connected(place) as database:
            upload(
                database[config.collection],
                named(read_records(files, options=options, reject=reject)),
                split=config.split,
                batch_size=config.batch_size,
                report=report,
                reject=reject,
            )
    print(f"inserted: {report.inserted}; there already: {report.present}")
    if report.refused:
        reasons = ", ".join(f"{code} {count}" for code, count in report.refused.most_common())
        print(f"refused: {reasons}; see {rejected}")
    wrong = sum(count for code, count in report.refused.items() if code not in LEFT_OUT)
    if wrong > config.max_reject_fraction * max(report.total, 1):
        raise InputError(
            f"{wrong} of {report.total} rows were refused",
            where=str(rejected),
            why=f"More than max_reject_fraction={config.max_reject_fraction}",
            fix="The file says for each row what to change; the others were stored",
        )
    return 0
